"""
Kills, full disks, lost processes, out of memory and Ctrl-C, for real: afterwards the weights are whole, the last checkpoint
loads, and the resumed run equals the uninterrupted one bit for bit.
"""

import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import in_process, in_ranks
from toys import Classifier, Points, build, train, weights_of
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

import xsam_hf.trainer.checkpoint
from xsam_hf import XSAMArguments, XSAMState, XSAMTrainer, xsam_gradient
from xsam_hf.passes import interrupts_held
from xsam_hf.weights import weights_kept


# 3 epochs of 4 updates, each with two micro-batches; a search in the first update of an epoch.
SETTINGS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 3,
    "rho": 0.5,
    "perturbation": "vasso",
    "alpha_samples": 6,
}


def model():
    return Classifier(dropout=0.3, batch_norm=True)


def faulty(update, number, fault):
    """A trainer that calls `fault(trainer)` at the end of forward pass `number` (from 1) of `update` (from 0)."""

    class Faulty(XSAMTrainer):
        start = None  # the weights at the beginning of the update
        first = None  # buffers and random numbers after the last pass at these weights
        seen = 0

        def training_step(self, *args, **kwargs):
            if self.state.global_step == update and self.start is None:
                self.start = weights_of(self)
            return super().training_step(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == update:
                self.seen += 1
                self.moved = not torch.equal(weights_of(self), self.start)
                if not self.moved:
                    self.first = [b.clone() for b in self.model.buffers()], torch.get_rng_state()
                if self.seen == number:
                    fault(self)
            return loss

    return Faulty


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_writing(path, share):
    """From now on, this process kills itself when it has written `share` of the file that ends in `path`."""

    def dying(write, position):
        def wrapped(*args, **kwargs):
            write(*args, **kwargs)
            written = str(args[position])
            if written.endswith(path):
                os.truncate(written, int(share * os.path.getsize(written)))
                die()

        return wrapped

    torch.save = dying(torch.save, 1)
    safetensors.torch.save_file = dying(safetensors.torch.save_file, 1)
    xsam_hf.trainer.checkpoint.save_file = dying(xsam_hf.trainer.checkpoint.save_file, 1)
    TrainerState.save_to_json = dying(TrainerState.save_to_json, 1)
    Path.write_text = dying(Path.write_text, 0)


@pytest.fixture(scope="module", autouse=True)
def _little_garbage_collection():
    """The Trainer collects garbage whenever it begins: most of the time of this file, over objects that are there for good."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _interrupts_are_delivered():
    """A shell that starts the tests in the background (`&`, `nohup`) makes them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    return directory, train(directory, model(), **SETTINGS)


@pytest.fixture
def warnings(caplog):
    """What our library warned about."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it does not propagate
    yield caplog
    logger.removeHandler(caplog.handler)


def searches(directory):
    return (directory / "xsam_search.jsonl").read_text().splitlines()


def assert_resumes_exactly(directory, whole):
    assert_same(train(directory, model(), resume=True, **SETTINGS), directory, whole)


def assert_same(run, directory, whole):
    expected_directory, expected = whole
    assert run.state.global_step == expected.state.max_steps
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name
    ours, theirs = run._xsam_callback.xsam, expected._xsam_callback.xsam
    assert ours == theirs and ours.average.keys() == theirs.average.keys()
    assert all(torch.equal(ours.average[name], theirs.average[name]) for name in theirs.average)
    assert searches(directory) == searches(expected_directory)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "update, number, moved, lines",
    [
        (4, 2, False, 1),  # in the first pass
        (4, 3, True, 1),  # in the ascent
        (4, 5, True, 1),  # in the first probe of the second epoch's search
        (4, 16, True, 1),  # in the last one
        (5, 3, True, 2),  # in an ascent, when that search is in the file already: it has to come again, once
    ],
)
def test_kill_in_a_pass(tmp_path, whole, update, number, moved, lines):
    def work(report):
        def fault(trainer):
            report(f"{trainer.moved}")
            die()

        train(tmp_path, model(), trainer=faulty(update, number, fault), **SETTINGS)

    assert in_process(work) == (-signal.SIGKILL, f"{moved}")
    assert len(searches(tmp_path)) == lines
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert_resumes_exactly(tmp_path, whole)


CHECKPOINT_FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "xsam_state.safetensors",
    "rng_state.pth",
    "trainer_state.json",
]


@pytest.mark.parametrize(
    "file, share", [(file, s) for file in CHECKPOINT_FILES for s in (0.5, 1)] + [(CHECKPOINT_FILES[-1], 0)]
)
def test_kill_in_the_middle_of_a_checkpoint(tmp_path, whole, warnings, file, share):
    def work(report):
        dies_in_writing(f"checkpoint-6/{file}", share)
        train(tmp_path, model(), **SETTINGS)

    assert in_process(work) == (-signal.SIGKILL, "")
    last = get_last_checkpoint(tmp_path)
    assert last == str(tmp_path / "checkpoint-6")
    written = {path.name for path in Path(last).iterdir()}
    position = CHECKPOINT_FILES.index(file) + 1
    assert written >= {*CHECKPOINT_FILES[:position]} and not written & {*CHECKPOINT_FILES[position:]}
    broken = not (file == "trainer_state.json" and share == 1)
    if broken:  # the test would notice if the last checkpoint were taken
        with pytest.raises((FileNotFoundError, json.JSONDecodeError, safetensors.SafetensorError)):
            train(tmp_path / "last", model(), resume=last, **SETTINGS)
    assert_resumes_exactly(tmp_path, whole)
    passed_over = [message for message in warnings.messages if message.startswith("Passing over")]
    assert passed_over == broken * [f"Passing over {last}: its last file, trainer_state.json, is missing or cut off."]


def test_kill_while_an_older_checkpoint_is_written_anew(tmp_path, whole):
    train(tmp_path, model(), **SETTINGS)
    for step in (9, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")

    def work(report):
        dies_in_writing("checkpoint-6/optimizer.pt", 0.5)
        train(tmp_path, model(), resume=str(tmp_path / "checkpoint-3"), **SETTINGS)

    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()
    assert in_process(work) == (-signal.SIGKILL, "")
    assert not (tmp_path / "checkpoint-6" / "trainer_state.json").exists()
    assert_resumes_exactly(tmp_path, whole)


def test_kill_while_the_searches_are_rewritten(tmp_path, whole):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    shutil.copy(whole[0] / "xsam_search.jsonl", tmp_path)

    def work(report):
        dies_in_writing("xsam_search.tmp", 0.5)
        train(tmp_path, model(), resume=True, **SETTINGS)

    assert in_process(work) == (-signal.SIGKILL, "")
    assert_resumes_exactly(tmp_path, whole)


@pytest.mark.parametrize("half_written", [False, True])
def test_without_a_whole_checkpoint_there_is_nothing_to_resume_from(tmp_path, whole, half_written):
    if half_written:
        shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="No valid checkpoint found .*: none was written to its end"):
        train(tmp_path, model(), resume=True, **SETTINGS)


def test_the_last_is_the_one_with_the_highest_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}" if name != "checkpoint-11" else "")
    assert xsam_hf.trainer.checkpoint.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# --- disk full -------------------------------------------------------------------------------------------------------


class DiskFull(TrainerCallback):
    """From the middle of `update` on, no file can grow beyond `limit` bytes. Keeps the weights of the last whole moment."""

    def __init__(self, update, limit):
        self.update, self.limit = update, limit

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights = [p.clone() for p in model.parameters()]
        if state.global_step == self.update:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights = [p.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "file, message",
    [
        ("xsam_search.jsonl", "File too large"),  # half of the line of the search in update 4 fits
        ("model.safetensors", "File too large"),
        ("optimizer.pt", "iostream error"),
        ("rng_state.pth", "iostream error"),
    ],
)
def test_disk_full(tmp_path, whole, file, message):
    searching = file == "xsam_search.jsonl"
    size = 1.5 * len(searches(whole[0])[0]) if searching else (whole[0] / "checkpoint-6" / file).stat().st_size

    def work(report):
        disk_full, network = DiskFull(4 if searching else 5, int(size) - 1), model()
        try:
            train(tmp_path, network, callbacks=[disk_full], **SETTINGS)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            report(str(error))
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), disk_full.weights, strict=True))
        assert all(torch.isfinite(weight).all() for weight in network.parameters())

    status, report = in_process(work)
    assert status == 0 and message in report, report
    assert (tmp_path / "checkpoint-6").exists() != searching
    assert xsam_hf.trainer.checkpoint.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert_resumes_exactly(tmp_path, whole)


# --- a process of two ------------------------------------------------------------------------------------------------

TWO = {**SETTINGS, "per_device_train_batch_size": 2}  # on two processes the updates of one with 4


def train_ranks(directory, resume):
    def work(rank, report):
        run = train(directory, model(), resume=resume, **TWO)
        state = {"weights": weights_of(run), "alpha": run._xsam_callback.xsam.alpha, "next": torch.rand(3)}
        torch.save(state, directory / f"rank{rank}.pt")

    results = in_ranks(work)
    assert [status for status, _ in results] == [0, 0], results
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return directory, train_ranks(directory, resume=None)


@pytest.mark.parametrize(
    "victim, fault",
    [
        (1, "ascent"),
        (0, "ascent"),
        (1, "probe"),
        (0, "checkpoint-6/optimizer.pt"),
        (1, "checkpoint-6/rng_state_1.pth"),  # process 0 would have finished the checkpoint without it
    ],
)
def test_a_killed_process_ends_the_others_and_the_restart_is_exact(tmp_path, whole_of_two, victim, fault):
    def work(rank, report):
        trainer = XSAMTrainer
        if rank == victim and fault in ("ascent", "probe"):
            trainer = faulty(*{"ascent": (5, 3), "probe": (4, 6)}[fault], lambda trainer: die())
        elif rank == victim:
            dies_in_writing(fault, 0.5)
        train(tmp_path, model(), trainer=trainer, **TWO)

    results = in_ranks(work)
    assert results[victim] == (-signal.SIGKILL, "")
    status, report = results[1 - victim]
    assert status == 1 and ("Connection closed by peer" in report or "Connection reset by peer" in report), report
    assert (tmp_path / "checkpoint-6").exists() == fault.startswith("checkpoint")
    assert xsam_hf.trainer.checkpoint.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    directory, expected = whole_of_two
    for ours, theirs in zip(train_ranks(tmp_path, resume=True), expected, strict=True):
        assert torch.equal(ours["weights"], theirs["weights"]) and ours["alpha"] == theirs["alpha"]
        assert torch.equal(ours["next"], theirs["next"])
    assert searches(tmp_path) == searches(directory)


def test_torchrun_restarts_a_killed_process_exactly(tmp_path, whole_of_two):
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--max_restarts", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
        "1"  # else gloo finds the addresses of the processes that are gone
    )
    command = [sys.executable, *command, str(Path(__file__).with_name("fault_worker.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    killed = tmp_path / "killed"
    assert killed.read_text() == "rank 1, update 5"
    written = {step: (tmp_path / f"checkpoint-{step}" / "trainer_state.json").stat().st_mtime_ns for step in (3, 6)}
    assert written[3] < killed.stat().st_mtime_ns < written[6]  # it did not begin anew
    directory, expected = whole_of_two
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), expected[rank]["weights"])
    assert searches(tmp_path) == searches(directory)


# --- out of memory and Ctrl-C in every pass --------------------------------------------------------------------------

# name: (what differs, forward passes of an update with a search)
VARIANTS = {
    "one step": ({}, 1 + 1 + 3),
    "three steps": ({"ascent_steps": 3}, 1 + 3 + 3),
    "accumulation": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 2 * (1 + 1 + 3)),
    "micro": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ascent_scope": "micro"},
        2 + 2 + 3,
    ),
    "slope_max": ({"gradient_scale": "slope_max"}, 1 + 1 + 3 + 1),
    "fraction": ({"ascent_fraction": 0.5}, 1 + 1 + 3),
    "every other": ({"sharpness_every": 2}, 1 + 1 + 3),
    "msam+": ({"direction": "msam+", "ascent_steps": 2}, 1 + 2),
    "asam": ({"perturbation": "asam", "alpha": 1.7}, 1 + 1),
    "fsam": ({"perturbation": "fsam"}, 1 + 1 + 3),
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("variant", VARIANTS)
def test_out_of_memory_and_interrupts_in_every_pass(tmp_path, variant, error):
    changes, passes = VARIANTS[variant]
    one_batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    settings = {**SETTINGS, **one_batch, "perturbation": "sam", "alpha_samples": 3, "num_train_epochs": 2, **changes}
    whole = tmp_path, train(tmp_path, model(), **{**settings, "save_steps": 4})
    shutil.rmtree(tmp_path / "checkpoint-8")

    def fault(trainer):
        raise error("out of memory")

    moved = []
    for number in range(1, passes + 1):
        run = build(tmp_path, model(), trainer=faulty(4, number, fault), **{**settings, "save_strategy": "no"})
        with pytest.raises(error):
            run.train(resume_from_checkpoint=True)
        moved.append(run.moved)
        assert torch.equal(weights_of(run), run.start)
        buffers, stream = run.first
        assert all(torch.equal(a, b) for a, b in zip(run.model.buffers(), buffers, strict=True))
        if run.moved:
            assert torch.equal(torch.get_rng_state(), stream) and all(p.grad is None for p in run.model.parameters())
        run.train(resume_from_checkpoint=True)  # the same trainer goes on, from its last checkpoint
        assert_same(run, tmp_path, whole)
        assert run.seen == number + passes
    assert moved.count(False) == settings["gradient_accumulation_steps"]


# --- Ctrl-C, and again during the restore ----------------------------------------------------------------------------


class Press:
    """Presses Ctrl-C at the `number`-th call of the code around the passes: at calls Python looks for signals."""

    FILES = (
        *("xsam.py", "passes.py", "pass_state.py", "module_state.py", "weights.py"),
        *("contextlib.py", "grad_mode.py", "signal.py", "random.py", "test_faults.py"),
    )

    def __init__(self, number):
        self.number, self.calls = number, 0

    def __call__(self, frame, event, argument):
        if event in ("call", "c_call", "c_return") and frame.f_code.co_filename.endswith(self.FILES):
            self.calls += 1
            if self.calls == self.number:
                signal.raise_signal(signal.SIGINT)


class Update:
    """One update of a small model with BatchNorm. `fault` is called in its ascent pass."""

    def __init__(self, fault=lambda: None):
        self.data, self.model, self.fault = Points(8), Classifier(batch_norm=True), fault
        self.passes, self.buffers = 0, None
        self.before = [p.clone() for p in self.model.parameters()]

    def loss(self):
        self.passes += 1
        return self.model(self.data.x, self.data.y)["loss"]

    def gradient(self):
        loss = self.loss()
        loss.backward()
        if self.passes == 1:
            self.buffers = [b.clone() for b in self.model.buffers()]
        else:
            assert not torch.equal(self.model.first.weight, self.before[0])
            self.fault()
        return loss.detach()

    def run(self, press=None):
        try:
            sys.setprofile(press)
            xsam_gradient(self.model, self.gradient, self.loss, XSAMArguments(rho=0.5, alpha_samples=2), XSAMState())
        finally:
            sys.setprofile(None)

    def is_whole(self):
        pairs = [*zip(self.model.parameters(), self.before, strict=True)]
        if self.buffers is not None:
            pairs += zip(self.model.buffers(), self.buffers, strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def test_an_interrupt_at_any_moment_leaves_the_weights_whole():
    for number in range(1, 5000):
        update, press = Update(), Press(number)
        try:
            update.run(press)
            pressed = False
        except KeyboardInterrupt:
            pressed = True
        assert update.is_whole() and signal.getsignal(signal.SIGINT) is signal.default_int_handler, number
        assert pressed == (press.calls >= number)  # none is lost
        if not pressed:
            break
    assert 100 < number < 4999


@pytest.mark.parametrize("first", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_interrupt_at_any_moment_after_a_failing_pass_leaves_the_weights_whole(first):
    for number in range(1, 1000):
        press = Press(number)

        def fault(press=press):
            sys.setprofile(press)
            raise first("out of memory")

        update = Update(fault)
        with pytest.raises((first, KeyboardInterrupt)) as raised:
            update.run()
        assert update.is_whole() and signal.getsignal(signal.SIGINT) is signal.default_int_handler, number
        if press.calls < number:
            assert raised.type is first
            break
        assert raised.type is KeyboardInterrupt
    assert 30 < number < 999


def press_in_restore(monkeypatch, update, passes):
    """Ctrl-C is pressed in the copy after so many passes, when the first weight is back and the others are not."""
    copy, weight = torch._foreach_copy_, next(update.model.parameters())

    def pressed(to, origin):
        if update.passes != passes or to[0].data_ptr() != weight.data_ptr():
            copy(to, origin)
            return
        copy(to[:1], origin[:1])
        assert not update.is_whole()
        os.kill(os.getpid(), signal.SIGINT)
        copy(to[1:], origin[1:])

    monkeypatch.setattr(torch, "_foreach_copy_", pressed)


@pytest.mark.parametrize("first", [None, RuntimeError, KeyboardInterrupt])
def test_an_interrupt_in_the_middle_of_the_restore_waits_for_its_end(monkeypatch, first):
    def fault():
        if first is not None:
            raise first

    update, passes = Update(fault), 4 if first is None else 2
    press_in_restore(monkeypatch, update, passes)
    with pytest.raises(KeyboardInterrupt):
        update.run()
    assert update.passes == passes and update.is_whole()
    # Why something has to hold it back: the copy alone ends half way.
    weights = [*update.model.parameters()]
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), weights_kept(weights):
        torch._foreach_add_(weights, 1.0)
    back = [torch.equal(a, b) for a, b in zip(weights, update.before, strict=True)]
    assert back[0] and not any(back[1:])


def test_an_interrupt_between_two_passes_comes_before_the_next_one(monkeypatch):
    update = Update()
    monkeypatch.setattr("xsam_hf.ascent.sam", lambda *arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        update.run()
    assert update.passes == 1 and update.is_whole()


def test_an_interrupt_that_a_pass_survives_is_the_last_that_stops_it():
    """A pass that Ctrl-C has ended may be in its `finally` already, and what follows writes weights back."""
    with pytest.raises(KeyboardInterrupt) as raised, interrupts_held() as stoppable:

        def one_pass():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return "to its end"

        assert stoppable(one_pass) == "to its end"
        with pytest.raises(KeyboardInterrupt):
            stoppable(lambda: "not begun")
        signal.raise_signal(signal.SIGINT)
        held = True
    assert raised.type is KeyboardInterrupt and held


@pytest.mark.parametrize("hook", [sys.setprofile, sys.settrace])
def test_an_interrupt_beneath_a_profiler_or_debugger_is_kept(hook):
    """Python up to 3.12 writes the variables of the frame that such a callback watches back to what they were before it."""

    def press(frame, event, argument):
        if not pressed and frame.f_code.co_name == "interrupts_held":
            pressed.append(event)
            signal.raise_signal(signal.SIGINT)
        return press

    pressed = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held():
            hook(press)
        hook(None)
    hook(None)
    assert pressed


def test_other_handlers_are_called_too_in_a_pass_and_after_the_restore(monkeypatch):
    def press():
        signal.raise_signal(signal.SIGINT)

    update, calls = Update(press), []
    press_in_restore(monkeypatch, update, passes=4)
    earlier = signal.signal(signal.SIGINT, lambda number, frame: calls.append((number, update.is_whole())))
    try:
        update.run()
        assert calls == [(signal.SIGINT, False), (signal.SIGINT, True)]
        press()
        assert len(calls) == 3  # the handler is in its place again
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        update.passes = 0
        update.run()
        assert update.is_whole() and len(calls) == 3 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_these_tests_pass_where_interrupts_are_ignored():
    """One of them, in a process that `nohup` or `&` might have started."""
    test = f"{__file__}::{test_an_interrupt_between_two_passes_comes_before_the_next_one.__name__}"

    def work(report):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        report(f"{pytest.main([test, '-q', '-p', 'no:cacheprovider'])!r}")

    assert in_process(work) == (0, "<ExitCode.OK: 0>")


def test_a_thread_has_no_interrupts_to_hold():
    def fault():
        raise RuntimeError("out of memory")

    update, errors = Update(fault), []

    def run():
        try:
            update.run()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == ["out of memory"] and update.is_whole()
