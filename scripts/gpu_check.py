"""
What only a GPU can tell about XSAM, checked on the one that is here: numbers, waits, kernels, memory, speed.

    scripts/run gpu_check                  # at most ten minutes, no network; results/gpu-check-cuda.json, and a table
    scripts/run gpu_check --device cpu     # what a CPU can tell, under a minute

Models and data are made in memory. Every check runs in a process of its own and has a limit of time, so that none of them ends
the others. Lines come as JSON while they are found; the table at the end has them all, each with the figure that is expected, and the
file is written anew after every line. The status is 1 if a line failed or raised. What several GPUs or more memory would be
needed for is skipped.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from scripts.benchmark import TrainerStep, gpt2, vit
from scripts.checks import (
    TOLD,
    Check,
    Expected,
    Figure,
    Line,
    Skip,
    at_least,
    at_most,
    each,
    exactly,
    run_checks,
    table,
)
from tasks.command import Parser, run, sentence
from tasks.files import write_whole
from tasks.image_classification.augmentation import Augmentation
from tasks.image_classification.data import DATASETS, Split
from tasks.image_classification.pixels import normalize
from tasks.results import git_commit
from xsam_hf import XSAMArguments, XSAMState, XSAMTrainer, XSAMTrainingArguments, xsam_gradient
from xsam_hf.pass_state import PassState
from xsam_hf.rounding import add_rounded


ROOT = Path(__file__).resolve().parent.parent
Found = Iterator[Figure]

METHODS: dict[str, dict[str, Any]] = {
    "sam": {"alpha": 1.0},
    "alpha 1.5": {"alpha": 1.5},
    "xsam": {"alpha_search_steps": 1},
    "three steps": {"alpha": 1.5, "ascent_steps": 3},
    **{name: {"perturbation": name, "alpha": 1.3} for name in ("asam", "vasso", "fsam", "stale")},
    **{name: {"direction": name, "ascent_steps": 2} for name in ("lsam", "lsam+", "msam", "msam+")},
    **{f"{scale} norm": {"alpha": 1.3, "gradient_scale": scale} for scale in ("first", "mean", "max", "slope")},
    "slope_max norm": {"alpha": 1.3, "gradient_scale": "slope_max"},
}
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_nan_inf_filter": False}


def needs_a_gpu(device: str, why: str = "it is about CUDA") -> None:
    if device != "cuda":
        raise Skip(why)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def network(device: str, dtype: torch.dtype, width: int = 64, seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A tanh network and its loss on 64 points: the same numbers on every device and, but for rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    with torch.no_grad():
        for weight in model.parameters():
            fan = weight.shape[-1] if weight.ndim > 1 else width
            weight.copy_(torch.randn(weight.shape, generator=generator) * fan**-0.5)
    model.to(device, dtype)
    x = torch.randn(64, 20, generator=generator).to(device, dtype)
    y = torch.randint(10, (64,), generator=generator).to(device)
    return model, lambda: nn.functional.cross_entropy(model(x).float() if dtype.itemsize < 4 else model(x), y)


def updates(device: str, dtype: torch.dtype, number: int, width: int = 64, **method) -> tuple[Tensor, XSAMState]:
    """The gradient of the last of some updates with SGD, on a CPU in float64, and the state."""
    model, loss = network(device, dtype, width)
    arguments, state = XSAMArguments(**{"rho": 0.5, **method}), XSAMState()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradient() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    for _ in range(number):
        optimizer.zero_grad()
        xsam_gradient(model, gradient, lambda: loss().detach(), arguments, state)
        gradients = torch.cat([weight.grad.detach().reshape(-1) for weight in model.parameters()])
        optimizer.step()
    return gradients.cpu().double(), state


def distance(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    """How many numbers are not the same, bit for bit or both NaN."""
    return sum(int((~((a == b) | (a.isnan() & b.isnan()))).sum()) for a, b in zip(before, after, strict=True))


# --- numbers -----------------------------------------------------------------------------------------------------------


def agreement_with_float64_on_a_cpu(device: str) -> Found:
    yield from each(_agreement, METHODS, device)


def _agreement(name: str, device: str) -> Found:
    right, kept = updates("cpu", torch.float64, 2, **METHODS[name])
    found, state = updates(device, torch.float32, 2, **METHODS[name])
    yield "gradient", distance(found, right), at_most(1e-5), "relative"
    if name == "xsam":
        yield "alpha", abs(state.alpha - kept.alpha), exactly(0), ""


def tf32(device: str) -> Found:
    needs_a_gpu(device)
    if torch.cuda.get_device_capability() < (8, 0):
        raise Skip("the device has no TF32")
    right, kept = updates(device, torch.float32, 2, width=1024, alpha_search_steps=1)
    torch.set_float32_matmul_precision("high")
    found, state = updates(device, torch.float32, 2, width=1024, alpha_search_steps=1)
    # Ten bits of mantissa; 0 would mean that it was not on.
    yield "gradient with TF32 and without", distance(found, right), Expected(1e-7, 2e-2), "relative"
    yield "alpha with TF32 and without", abs(state.alpha - kept.alpha), at_most(0.1001), ""


def weights_come_back(device: str) -> Found:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rounding in ("weights", "stochastic"):
            model, loss = network(device, dtype)
            before = [weight.detach().clone() for weight in model.parameters()]
            arguments = XSAMArguments(rho=0.5, ascent_steps=2, perturbation_dtype=rounding)
            lost = 0
            for fail_at in (0, 2, 3):
                calls = 0

                def gradient(model=model, loss=loss, fail_at=fail_at) -> Tensor:
                    nonlocal calls
                    calls += 1
                    if calls == fail_at:
                        raise InterruptedError
                    model.zero_grad()
                    value = loss()
                    value.backward()
                    return value.detach()

                try:
                    xsam_gradient(model, gradient, lambda loss=loss: loss().detach(), arguments, XSAMState())
                except InterruptedError:
                    pass
                lost += changed(before, list(model.parameters()))
            yield (
                f"{str(dtype)[6:]}, {rounding}: changed after an update, after raised passes",
                lost,
                exactly(0),
                "numbers",
            )


def rounding_at_random(device: str) -> Found:
    n = 2**26 if device == "cuda" else 2**20
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.ones(n, dtype=dtype, device=device)
        step = torch.full_like(weight, 1e-4)
        generator = torch.Generator(device).manual_seed(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        add_rounded([weight], [([step], 1.0)], generator)
        if device == "cuda":
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            yield f"{str(dtype)[6:]}: temporaries", peak, at_most(64), "MiB"
        mean = (weight.double().mean().item() - 1) / step[0].item()
        # Of n weights, each moved by a gap with a chance of p: the mean's standard deviation is gap √(p / n).
        yield f"{str(dtype)[6:]}: mean of a step that rounding loses", mean, Expected(0.9, 1.1), "of it"


def half_precision(device: str) -> Found:
    """Autocast; a GradScaler, and an update that overflows."""
    right = _losses(device)
    names = ("bf16", "fp16", "fp16 overflow") if device == "cuda" else ("bf16",)
    yield from each(_half_precision, names, device, right)


def _losses(device: str, **settings) -> list[float]:
    trainer = language_model_training(device, max_steps=6, logging_steps=1, **settings)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _half_precision(name: str, device: str, right: list[float]) -> Found:
    if name != "fp16 overflow":
        worst = max(abs(a - b) / a for a, b in zip(right, _losses(device, **{name: True}), strict=True))
        yield "losses of six updates beside float32's", worst, at_most(0.02 if name == "bf16" else 0.05), "relative"
        return

    class TooLarge(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            scaler = trainer.accelerator.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**100})
            self.before = [weight.detach().clone() for weight in trainer.model.parameters()]

    trainer = language_model_training(device, train=False, max_steps=1, fp16=True)
    callback = TooLarge()
    trainer.add_callback(callback)
    trainer.train()
    yield "changed", changed(callback.before, list(trainer.model.parameters())), exactly(0), "numbers"
    yield "scale afterwards", trainer.accelerator.scaler.get_scale() / 2.0**100, exactly(0.5), "of before"


ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def the_same_dropout_in_every_pass(device: str) -> Found:
    names = [*ATTENTION, "inductor", "checkpointing"] if device == "cuda" else ["math", "checkpointing"]
    yield from each(_dropout, names, device)


def _dropout(name: str, device: str) -> Found:
    ids = torch.randint(200, (4, 128), generator=torch.Generator().manual_seed(0)).to(device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return tiny_gpt2(dropout=0.1).to(device)

    def loss(model: nn.Module) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    if name == "checkpointing":
        gradients = []
        for model in (build(), build()):
            if gradients:
                model.gradient_checkpointing_enable()
            torch.manual_seed(1)
            loss(model.train()).backward()
            gradients.append(torch.cat([weight.grad.reshape(-1) for weight in model.parameters()]))
        yield "gradient beside that without", distance(*gradients), at_most(1e-5), "relative"
        return
    model = torch.compile(build()) if name == "inductor" else build()
    backend = sdpa_kernel(ATTENTION[name]) if name in ATTENTION else nullcontext()
    with backend, torch.autocast(device, torch.bfloat16):
        before = PassState.capture(None)
        first = loss(model).detach()
        before.restore()
        again, other = loss(model).detach(), loss(model).detach()
    yield "two passes differ by", (first - again).abs(), exactly(0), ""
    yield "with other masks by", (first - other).abs(), at_least(1e-6), ""


# --- the Trainer -------------------------------------------------------------------------------------------------------


def tiny_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    dropouts = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], dropout)
    size = {"vocab_size": 200, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, use_cache=False, **size, **dropouts))


def language_model_training(
    device: str, train: bool = True, dropout: float = 0.0, resume: str | None = None, plain: bool = False, **settings
):
    """A trainer of a tiny GPT-2 on 64 sequences in their order, trained."""
    tokens = torch.randint(200, (64, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    torch.manual_seed(0)
    model = tiny_gpt2(dropout)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "per_device_train_batch_size": 16, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0,
            "train_sampling_strategy": "sequential", "use_cpu": device == "cpu", "seed": 0, **QUIET,
        }  # fmt: skip
        if plain:
            trainer = Trainer(model, TrainingArguments(**{**common, **settings}), train_dataset=data)
        else:
            trainer = XSAMTrainer(
                model,
                XSAMTrainingArguments(**{**common, "rho": 0.3, "alpha_samples": 5, **settings}),
                train_dataset=data,
            )
        if train:
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def refusals(device: str) -> Found:
    def refused(**settings) -> int:
        try:
            language_model_training(device, train=False, **settings)
        except NotImplementedError:
            return 1
        return 0

    for mode, expected in (("reduce-overhead", 1), ("max-autotune", 1), ("max-autotune-no-cudagraphs", 0)):
        found = refused(torch_compile=True, torch_compile_mode=mode)
        yield f"torch_compile_mode {mode} is refused", found, exactly(expected), ""
    yield "torch_compile_backend cudagraphs is refused", refused(torch_compile=True, torch_compile_backend="cudagraphs"), exactly(1), ""  # fmt: skip
    if device == "cuda":
        model = tiny_gpt2()
        model.lm_head = nn.Linear(64, 200, bias=False)  # untied
        model.transformer.to("cuda")
        model.hf_device_map = {"transformer": "cuda:0", "lm_head": "cpu"}
        model.is_parallelizable = model.model_parallel = True
        try:
            with tempfile.TemporaryDirectory() as folder:
                XSAMTrainer(model, XSAMTrainingArguments(folder, **QUIET))
            found = 0
        except NotImplementedError:
            found = 1
        yield "a model on two devices is refused", found, exactly(1), ""


def compiled(device: str) -> Found:
    needs_a_gpu(device, "tests/test_compile.py does it on a CPU")
    yield from each(
        _compiled, ("default", "max-autotune-no-cudagraphs"), device, _losses(device, alpha_search_steps=2)
    )


def _compiled(mode: str, device: str, eager: list[float]) -> Found:
    class Graphs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 6):
                found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    found: list[int] = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = language_model_training(
        device,
        train=False,
        max_steps=6,
        logging_steps=1,
        alpha_search_steps=2,
        torch_compile=True,
        torch_compile_mode=mode,
    )
    trainer.add_callback(Graphs())
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    worst = max(abs(a - b) / a for a, b in zip(eager, logged, strict=True))
    yield "losses of six updates beside eager's", worst, at_most(1e-3), "relative"
    yield "graphs", found[0], at_least(1), ""
    yield "graphs made after two updates", found[1] - found[0], exactly(0), ""


def repeated_and_resumed_runs(device: str) -> Found:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

    def weights(**settings) -> list[Tensor]:
        trainer = language_model_training(
            device, dropout=0.1, max_steps=6, learning_rate=1e-3, optim="adamw_torch", **settings
        )
        return [weight.detach().cpu() for weight in trainer.model.parameters()]

    told = TOLD if device == "cuda" else exactly(0)  # atomic additions come in another order every time
    yield "a run and its repetition, kernels as they come", changed(weights(), weights()), told, "numbers"
    torch.use_deterministic_algorithms(True)  # raises where an operation has none
    with tempfile.TemporaryDirectory() as folder:
        whole = weights(output_dir=folder, save_strategy="steps", save_steps=2)
        yield "deterministic kernels: a run and its repetition", changed(whole, weights()), exactly(0), "numbers"
        resumed = weights(resume=f"{folder}/checkpoint-2")
    yield "deterministic kernels: a run and the resumed one", changed(whole, resumed), exactly(0), "numbers"


# --- processes ---------------------------------------------------------------------------------------------------------


def trained_by(device: str, processes: int, backend: str, shared: bool, settings: dict[str, Any]) -> list[Tensor]:
    """The weights of a training by several processes, which share a GPU or have one each; by one without a group for 0."""
    with tempfile.TemporaryDirectory() as folder:
        file, port = Path(folder, "weights.pt"), free_port()
        started = []
        for rank in range(max(processes, 1)):
            group = {
                "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0" if shared else str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            others = {"ddp_backend": backend, **settings} if processes else settings
            batch = {"max_steps": 4, "per_device_train_batch_size": 16 // max(processes, 1)}
            arguments = (device, group if processes else {}, file, {**batch, **others})
            started.append(multiprocessing.Process(target=_train_one_of, args=arguments))
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise RuntimeError(f"the processes ended with {[process.exitcode for process in started]}")
        return torch.load(file)


def _train_one_of(device: str, group: dict[str, str], file: Path, settings: dict[str, Any]) -> None:
    os.environ |= group
    torch.set_num_threads(1)
    trainer = language_model_training(device, **settings)
    alone = group.get("WORLD_SIZE", "1") == "1"
    parts = [
        weight if not isinstance(weight, DTensor) else weight.to_local() if alone else weight.full_tensor()
        for weight in trainer.model.parameters()
    ]
    if trainer.is_world_process_zero():
        torch.save([part.detach().cpu() for part in parts], file)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
SHARDED: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, find_unused_parameters": {"ddp_find_unused_parameters": True},
    "FSDP2": {"fsdp": True, "fsdp_config": FSDP2},
    "FSDP2, offloaded": {"fsdp": True, "fsdp_config": {**FSDP2, "cpu_offload": True}},  # searches wait for copies
}


def _beside_one(name: str, device: str, processes: int, backend: str, shared: bool) -> Found:
    right, found = (
        torch.cat([part.double().reshape(-1) for part in trained_by(device, *group)])
        for group in ((0, "", shared, {}), (processes, backend, shared, SHARDED[name]))
    )
    yield "weights after four updates beside one process's", distance(found, right), at_most(1e-5), "relative"


def two_gloo_processes(device: str) -> Found:
    yield from each(_beside_one, ["DDP"], device, 2, "gloo", True)


def one_nccl_process(device: str) -> Found:
    needs_a_gpu(device)
    yield from each(_beside_one, ["DDP", "FSDP2", "FSDP2, offloaded"], device, 1, "nccl", True)


def two_gpus(device: str) -> Found:
    needs_a_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skip("there are not two GPUs")
    yield from each(_beside_one, ["DDP", "DDP, find_unused_parameters", "FSDP2"], device, 2, "nccl", False)


# --- waits and kernels -------------------------------------------------------------------------------------------------


@contextmanager
def counted_waits() -> Iterator[Callable[[], int]]:
    """How often the host has waited for the device within the block."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_for_the_device(device: str) -> Found:
    needs_a_gpu(device)
    with counted_waits() as waits:
        torch.ones((), device=device).item()
        found = waits()
    yield "item(), to see that they are counted", found, at_least(1), "waits"
    yield from each(_waits_of_an_update, METHODS, device)
    plain = _waits_of_a_step(device, plain=True)
    yield "plain Trainer: a step without logging_nan_inf_filter", plain, TOLD, "waits"
    filtered = _waits_of_a_step(device, plain=True, logging_nan_inf_filter=True)
    yield "plain Trainer: logging_nan_inf_filter adds, a step", filtered - plain, at_least(1), "waits"
    yield from each(_waits_of_our_own, LOOPS, device, plain)


LOOPS: dict[str, dict[str, Any]] = {
    "sam": {"alpha": 1.0},
    "alpha 1.5": {"alpha": 1.5},
    "three steps": {"alpha": 1.5, "ascent_steps": 3},
    "ascent_fraction 0.5": {"alpha": 1.0, "ascent_fraction": 0.5},
    "micro": {"alpha": 1.0, "ascent_scope": "micro"},
    "stale": {"alpha": 1.0, "perturbation": "stale"},
}


def _waits_of_an_update(name: str, device: str) -> Found:
    method = {} if name == "xsam" else METHODS[name]  # searched once, and α kept
    model, loss = network(device, torch.float32)
    arguments, state = XSAMArguments(**method), XSAMState()

    def gradient() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    for _ in range(3):  # the first two look at what a pass has moved
        model.zero_grad()
        state.search_due = state.updates == 0
        with counted_waits() as waits:
            xsam_gradient(model, gradient, lambda: loss().detach(), arguments, state, ascend=True)
            found = waits()
    yield "an update", found, exactly(0), "waits"


def _waits_of_a_step(device: str, **settings) -> float:
    """In the whole loop of training: those of 24 steps minus those of 8."""
    totals = []
    for steps in (8, 24):
        trainer = language_model_training(device, False, 0.1, max_steps=steps, logging_strategy="no", **settings)
        with counted_waits() as waits:
            trainer.train()
            totals.append(waits())
    return (totals[1] - totals[0]) / 16


def _waits_of_our_own(name: str, device: str, plain: float) -> Found:
    yield "XSAMTrainer adds, a step", _waits_of_a_step(device, **LOOPS[name]) - plain, exactly(0), "waits"


SMALL = [(192, 192), (192,)] * 75
MANY = [(192, 192), (192,)] * 500


def free_passes(
    device: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, measure: bool = True, **method
) -> tuple[Callable[[], float], list[Tensor]]:
    """An update whose passes only write gradients; a call returns its milliseconds without those."""
    weights = [torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    prepared = [torch.randn_like(weight) for weight in weights]
    arguments, state = XSAMArguments(**method), XSAMState(search_due=False)
    clock = Clock(device)

    def gradient() -> Tensor:
        clock.pause()
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        torch._foreach_copy_([weight.grad for weight in weights], prepared)
        clock.go_on()
        return loss

    loss = torch.zeros((), device=device)

    def update() -> float:
        clock.start()
        xsam_gradient(weights, gradient, lambda: loss, arguments, state, measure=measure)
        return clock.stop()

    return update, weights


class Clock:
    """Milliseconds of the device, pauses left out."""

    def __init__(self, device: str):
        self.device, self.marks = device, []

    def _mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def start(self) -> None:
        self.marks.clear()
        synchronize(self.device)
        self._mark()

    pause = go_on = _mark

    def stop(self) -> float:
        self._mark()
        synchronize(self.device)
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(a.elapsed_time(b) if self.device == "cuda" else 1000 * (b - a) for a, b in pairs)


def kernels_of_an_update(device: str) -> Found:
    needs_a_gpu(device)
    for shapes, most in ((SMALL, 150), (MANY, 450)):
        writes = 2 * math.ceil(len(shapes) / 64)  # of the passes: foreach copies, 64 tensors a kernel
        for dtype in (torch.float32, torch.bfloat16):
            update, _ = free_passes(device, shapes, dtype, alpha=1.3)
            for _ in range(2):
                update()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                update()
            kernels = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not e.name.startswith("Mem")]
            yield f"{len(shapes)} weights, {str(dtype)[6:]}: kernels", len(kernels), at_most(most + writes), "kernels"


# --- speed and memory --------------------------------------------------------------------------------------------------


def median_of(step: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """Milliseconds."""
    times = []
    for i in range(rounds + 3):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        if i >= 3:
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


OWN: dict[str, tuple[Callable[[], nn.Module], Expected, Expected]] = {
    # A small model's time is that of launching kernels. tests/test_gpu.py counts 36 reads and writes of each weight where α and the
    # angle are kept; AdamW's step has 7.
    "ViT-Ti": (lambda: vit("vit-ti", "cifar100", 1)[0], at_most(1.5), TOLD),
    "ViT-L": (lambda: vit_large(), TOLD, at_most(36 / 7 * 1.2)),
    "GPT-2 124M": (lambda: gpt2(1, 1)[0], TOLD, at_most(36 / 7 * 1.2)),
}


def own_time(device: str) -> Found:
    """The arithmetic beside AdamW's."""
    yield from each(_own_time, OWN if device == "cuda" else ["ViT-Ti"], device)


def _own_time(name: str, device: str) -> Found:
    build, most_ms, most_times = OWN[name] if device == "cuda" else (OWN[name][0], TOLD, TOLD)
    shapes = [weight.shape for weight in build().parameters()]
    kept, weights = free_passes(device, shapes, alpha=1.5)
    own = statistics.median([kept() for _ in range(8)][3:])
    yield "own arithmetic, alpha kept", own, most_ms, "ms"
    sam, _ = free_passes(device, shapes, measure=False, alpha=1.0)
    yield "own arithmetic, SAM between logs", statistics.median([sam() for _ in range(8)][3:]), most_ms, "ms"
    step = median_of(torch.optim.AdamW(weights, fused=True).step, device, 5)
    yield "fused AdamW's step", step, TOLD, "ms"
    yield "own arithmetic, alpha kept, beside it", own / step, most_times, "times"


def vit_large() -> ViTForImageClassification:
    size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return ViTForImageClassification(ViTConfig(num_labels=1000, **size))


def _vit_large_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    return vit_large(), {"pixel_values": torch.randn(64, 3, 224, 224), "labels": torch.randint(1000, (64,))}


def on_device(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _speed(device: str, name: str, build: Callable[[], tuple[nn.Module, dict]], sam_most: Expected) -> Found:
    methods = {"plain": "plain", "sam": "sam", "xsam": "xsam, alpha kept"}
    settings = {"use_cpu": device == "cpu", "logging_nan_inf_filter": False, "logging_steps": 10**6}
    if device == "cuda":
        settings |= {"bf16": True, "optim": "adamw_torch_fused"}
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for short, method in methods.items():
            torch.manual_seed(0)
            model, batch = build()
            steps[short] = TrainerStep(method, model, on_device(device, batch), folder, 1, **settings)
        rounds: dict[str, list[float]] = {short: [] for short in methods}
        for i in range(11 if device == "cuda" else 5):
            for short, step in steps.items():
                synchronize(device)
                began = time.perf_counter()
                step()
                synchronize(device)
                if i >= 3:
                    rounds[short].append(1000 * (time.perf_counter() - began))
    yield f"{name}: plain update", statistics.median(rounds["plain"]), TOLD, "ms"
    for a, b, most in (("sam", "plain", sam_most), ("xsam", "sam", at_most(1.02) if sam_most != TOLD else TOLD)):
        ratio = statistics.median(x / y for x, y in zip(rounds[a], rounds[b], strict=True))
        yield f"{name}: {a} to {b}", ratio, most, "times"


def speed_of_a_small_vit(device: str) -> Found:
    if device == "cpu":
        yield from _speed(device, "vit-small b64", lambda: vit("vit-small", "digits", 64), TOLD)
    else:
        yield from _speed(device, "ViT-Ti b256 bf16", lambda: vit("vit-ti", "cifar100", 256), at_most(2.1))


def speed_of_vit_large(device: str) -> Found:
    needs_memory(device, 48)
    yield from _speed(device, "ViT-L b64 bf16", _vit_large_batch, at_most(2.1))


def speed_of_gpt2(device: str) -> Found:
    needs_memory(device, 48)
    yield from _speed(device, "GPT-2 124M 8×1024 bf16", lambda: gpt2(8, 1024), at_most(2.1))


def needs_memory(device: str, gib: int) -> None:
    needs_a_gpu(device)
    if torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        raise Skip(f"the device has less than {gib} GiB")


def memory(device: str) -> Found:
    """One copy of the weights more than plain training, and 2.05 in a search, when no activations are alive."""
    needs_memory(device, 16)
    peaks = {}
    for name in ("plain", "sam", "xsam, search"):
        torch.manual_seed(0)
        model, batch = gpt2(8, 256)
        own = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            step = TrainerStep(
                name, model, on_device(device, batch), folder, 1, use_cpu=False, optim="adamw_torch_fused"
            )
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                step()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() / own
        del model, step
        torch.cuda.empty_cache()
    yield "GPT-2 124M, plain: peak", peaks["plain"], TOLD, "× weights"
    yield "GPT-2 124M, sam: more than plain", peaks["sam"] - peaks["plain"], Expected(0.99, 1.05), "× weights"
    yield (
        "GPT-2 124M, search: more than plain",
        peaks["xsam, search"] - peaks["plain"],
        Expected(0.99, 2.05),
        "× weights",
    )


def images(device: str) -> Found:
    n = 50_000 if device == "cuda" else 10_000
    pictures = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    split = Split(pictures, np.zeros(n, int), Augmentation(DATASETS["cifar100"]))
    order = np.random.default_rng(1).permutation(n)[: n // 256 * 256].reshape(-1, 256).tolist()

    def rate() -> float:
        began = time.thread_time()
        for batch in order:
            default_data_collator(split.__getitems__(batch))
        return len(order) * 256 / (time.thread_time() - began)

    yield "crops and flips, bytes, collated; one core", max(rate() for _ in range(3)), at_least(50_000), "a second"
    batch = default_data_collator(split.__getitems__(order[0]))["pixel_values"]
    there = normalize(batch.to(device), DATASETS["cifar100"]).cpu()
    error = (there - normalize(batch, DATASETS["cifar100"])).abs().max()
    yield "normalised on the device and on a CPU", error, at_most(1e-6), ""
    if device == "cpu":
        return
    workers = min(4, os.cpu_count() or 1)
    loader = DataLoader(
        split, 256, shuffle=True, num_workers=workers, pin_memory=True, persistent_workers=True, drop_last=True,
        collate_fn=default_data_collator,
    )  # fmt: skip
    for _ in range(2):  # the first starts the workers
        began = time.perf_counter()
        for batch in loader:
            normalize(batch["pixel_values"].to(device, non_blocking=True), DATASETS["cifar100"])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    # A plain ViT-Ti on an H100 takes about 20,000.
    yield (
        f"{workers} workers, pinned, on the device and normalised",
        len(order) * 256 / seconds,
        at_least(40_000),
        "a second",
    )


CHECKS = [
    agreement_with_float64_on_a_cpu,
    tf32,
    weights_come_back,
    rounding_at_random,
    half_precision,
    the_same_dropout_in_every_pass,
    refusals,
    waits_for_the_device,
    kernels_of_an_update,
    memory,
    own_time,
    speed_of_a_small_vit,
    speed_of_gpt2,
    speed_of_vit_large,
    images,
    repeated_and_resumed_runs,
    two_gloo_processes,
    one_nccl_process,
    two_gpus,
    compiled,
]


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--checks", nargs="+", metavar="NAME", help="only these, as the table names them, with _ for spaces"
    )
    parser.add_argument("--output", type=Path, help="default: results/gpu-check-DEVICE.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no check begins or goes on")
    args = parser.parse_args(argv)
    known: dict[str, Check] = {check.__name__: check for check in CHECKS}
    for name in args.checks or ():
        if name not in known:
            parser.error(f"there is no check {name}; there are {', '.join(known)}")
    # A process that has asked the driver cannot be forked; this asks the management library.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA device here: run it where one is, or with `--device cpu`.")
    path = args.output or ROOT / "results" / f"gpu-check-{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    lines: list[Line] = []

    def keep(facts: dict[str, Any]) -> None:
        result = {
            "device": args.device,
            **facts,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **{p: version(p) for p in ("transformers", "accelerate")}},
            "git_commit": git_commit(),
            "seconds": round(time.monotonic() - begun, 1),
            "lines": [line.as_json() for line in lines],
        }  # fmt: skip
        write_whole(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    chosen = [known[name] for name in args.checks] if args.checks else CHECKS
    facts = _describe() if args.device == "cuda" else {}
    all_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    for check in chosen:
        if check is two_gpus and all_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = all_gpus
        elif check is two_gpus:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:  # the Trainer would use all that it sees
            os.environ["CUDA_VISIBLE_DEVICES"] = (all_gpus or "0").split(",")[0]
        for line in run_checks([check], args.device, 150, begun + 60 * args.minutes):
            lines.append(line)
            print(json.dumps(line.as_json(), ensure_ascii=False), flush=True)
            keep(facts)
    print(f"\n{table(lines)}\n")
    counts = {
        status: sum(line.status == status for line in lines)
        for status in ("ok", "told", "skipped", "failed", "raised")
    }
    print(
        ", ".join(f"{n} {status}" for status, n in counts.items() if n), f"in {time.monotonic() - begun:.0f} s; {path}"
    )
    if counts["failed"] or counts["raised"]:
        sys.exit(1)


def _describe() -> dict[str, Any]:
    """
    The GPU's facts, asked for in another process; sets how processes are started here: the fast way, if CUDA works after it.

    Raises:
        `ValueError`: CUDA does not work.
    """
    for start in ("fork", "spawn"):
        multiprocessing.set_start_method(start, force=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
            try:
                return pool.submit(_facts).result(timeout=120)
            except Exception as caught:
                error = caught
    raise ValueError(f"CUDA does not work here: {sentence(error)}.")


def _facts() -> dict[str, Any]:
    torch.zeros(1, device="cuda")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    run(main)
