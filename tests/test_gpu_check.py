"""scripts/gpu_check.py: the whole of it on a CPU, what it does with checks that go wrong, and its counts on the pretended GPU."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretended_gpu

from scripts import checks, gpu_check, gpu_launches, gpu_numbers
from scripts.checks import TOLD, Expected, Line, Skip, at_least, at_most, each, exactly, run_checks
from tasks.command import sentence


ROOT = Path(__file__).resolve().parent.parent
ON_A_GPU = {
    "tf32", "waits for the device", "kernels of an update", "memory", "speed of gpt2", "speed of vit large",
    "one nccl process", "two gpus", "compiled",
}  # fmt: skip


def test_a_cpu_passes_what_it_can_tell(tmp_path):
    path = tmp_path / "new" / "check.json"
    line = [sys.executable, "-m", "scripts.gpu_check", "--device", "cpu", "--output", str(path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(path.read_text())
    lines = result["lines"]
    printed, table = done.stdout.split("\n\n", 1)
    assert [json.loads(text) for text in printed.splitlines()] == lines
    assert table.count("\n|") == len(lines) + 1  # and the header's rule
    assert {line["check"] for line in lines} == {checks._name(check) for check in gpu_check.CHECKS}
    assert {line["check"] for line in lines if line["status"] == "skipped"} == ON_A_GPU
    assert {line["status"] for line in lines} == {"ok", "told", "skipped"}
    found = {(line["check"], line["what"]): line["found"] for line in lines}
    agreements = [
        value for (check, what), value in found.items() if check.startswith("agreement") and "gradient" in what
    ]
    assert len(agreements) == len(gpu_numbers.METHODS) and 0 < min(agreements) and max(agreements) <= 1e-5
    assert result["device"] == "cpu" and result["seconds"] > 0 and result["versions"]["torch"] == torch.__version__


def test_no_gpu_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch finds no CUDA device here"):
        gpu_check.main(["--output", str(tmp_path / "no.json")])
    with pytest.raises(ValueError) as refused:
        gpu_check.main(["--device", "cpu", "--checks", "speed"])
    assert "there is no check speed; there are agreement_with_float64_on_a_cpu, tf32" in sentence(refused.value)
    assert not (tmp_path / "no.json").exists()


def test_a_line_that_fails_is_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CHECKS", [good, wrong])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--device", "cpu", "--output", str(tmp_path / "check.json")])
    assert ended.value.code == 1 and "2 ok, 1 told, 1 failed" in capsys.readouterr().out
    gpu_check.main(["--device", "cpu", "--checks", "good", "--output", str(tmp_path / "check.json")])
    assert [line["found"] for line in json.loads((tmp_path / "check.json").read_text())["lines"]] == [1, "inf"]


# --- checks that go wrong ------------------------------------------------------------------------------------------------


def good(device):
    assert device == "cpu"
    yield "one", torch.tensor(1.0), exactly(1), "pieces"
    yield "told", math.inf, TOLD, ""


def wrong(device):
    yield "too many", 2, at_most(1), ""
    yield "enough", 2, at_least(1), ""


def not_a_number(device):
    yield "nan", math.nan, at_least(0), ""


def raises(device):
    yield "before", 0, exactly(0), ""
    raise RuntimeError("CUDA error:\n device-side assert")


def is_killed(device):
    os.write(2, b"Fatal: the driver is gone")
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def parts_raise(device):
    yield from each(part, ["first", "second", "third"], 3)


def part(name, value):
    yield "before", value, exactly(3), ""
    if name == "second":
        raise KeyError("no kernel")
    yield "after", value, exactly(3), ""


def hangs(device):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
    yield "worker", pid, TOLD, ""
    time.sleep(60)


def is_skipped(device):
    raise Skip("there are not two GPUs")
    yield


def test_no_check_ends_the_others():
    began = time.monotonic()
    lines = [
        *run_checks(
            [raises, is_killed, parts_raise, hangs, wrong, not_a_number, is_skipped, good], "cpu", 8, began + 500
        )
    ]
    found = [(line.check, line.what, line.status, line.expected) for line in lines]
    assert found == [
        ("raises", "before", "ok", "0"),
        ("raises", "", "raised", ""),
        ("is killed", "", "raised", ""),
        ("parts raise", "first: before", "ok", "3"),
        ("parts raise", "first: after", "ok", "3"),
        ("parts raise", "second: before", "ok", "3"),
        ("parts raise", "second", "raised", ""),
        ("parts raise", "third: before", "ok", "3"),
        ("parts raise", "third: after", "ok", "3"),
        ("hangs", "worker", "told", ""),
        ("hangs", "", "raised", ""),
        ("wrong", "too many", "failed", "≤ 1"),
        ("wrong", "enough", "ok", "≥ 1"),
        ("not a number", "nan", "failed", "≥ 0"),
        ("is skipped", "", "skipped", ""),
        ("good", "one", "ok", "1"),
        ("good", "told", "told", ""),
    ]
    notes = [line.note for line in lines if line.note]
    assert notes[0].startswith("RuntimeError: CUDA error: device-side assert (test_gpu_check.py:")
    assert notes[1] == f"its process ended with status {-signal.SIGKILL}: Fatal: the driver is gone"
    assert notes[2].startswith("KeyError: 'no kernel' (test_gpu_check.py:")
    assert notes[3:] == ["it was not done after 8 s", "there are not two GPUs"]
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # its parent is gone, and whoever takes orphans buries it
            os.kill(int(lines[9].found), 0)
            time.sleep(0.1)
    late = [*run_checks([good, wrong], "cpu", 8, time.monotonic() - 1)]
    assert [(line.status, line.note) for line in late] == [("skipped", "no time was left")] * 2


def test_figures_are_held_to_their_range():
    between = Expected(0.99, 1.05)
    assert [between.holds(value) for value in (0.98, 0.99, 1.05, 1.06, math.nan)] == [False, True, True, False, False]
    assert (
        TOLD.holds(math.nan) and str(TOLD) == "" and str(between) == "0.99 to 1.05" and str(at_most(1e-5)) == "≤ 1e-05"
    )
    lines = [Line("a", "b", "ok", 123456.7, "≥ 50000", "a second"), Line("c", "", "raised", note="died")]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in checks.table(lines).splitlines()]
    assert rows[2:] == [["a", "b", "123,457", "≥ 50000", "a second", "ok"], ["c", "died", "", "", "", "raised"]]


# --- what it counts on a GPU ---------------------------------------------------------------------------------------------


def test_its_update_launches_what_it_expects(monkeypatch):
    class Clock:
        def __init__(self, device):
            pass

        start = pause = go_on = stop = lambda self: None

    monkeypatch.setattr(gpu_launches, "Clock", Clock)
    with pretended_gpu() as gpu:
        update, _ = gpu_launches.free_passes("cuda", gpu_launches.SMALL, alpha=1.3)
        gpu.begin()
        update()
        writes = 2 * math.ceil(len(gpu_launches.SMALL) / 64)
        assert 50 < gpu.kernels - writes <= 150 and not gpu.one_by_one


def test_the_clock_leaves_pauses_out(monkeypatch):
    now = iter([1.0, 1.1, 5.0, 5.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = gpu_launches.Clock("cpu")
    clock.start()
    clock.pause()
    clock.go_on()
    assert clock.stop() == pytest.approx(300)
