"""What `gpu_check` asks of costs: waits, kernels, time and memory, of updates and of images."""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, default_data_collator

from scripts.benchmark import TrainerStep, gpt2, image_model
from scripts.checks import TOLD, Expected, Found, Skip, at_least, at_most, each, exactly, needs_a_gpu
from scripts.gpu_numbers import METHODS, network
from scripts.gpu_training import language_model_training, tiny_gpt2
from tasks.image_classification.augmentation import Augmentation
from tasks.image_classification.catalogue import DATASETS
from tasks.image_classification.labelled_images import Split
from tasks.image_classification.pixels import normalize
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
    of_a_pass = _waits_of_a_pass(device)
    yield "the model: a pass", of_a_pass, TOLD, "waits"
    yield from each(_waits_of_our_own, LOOPS, device, plain, of_a_pass)


# Each with the passes that it adds to plain training's.
LOOPS: dict[str, tuple[int, dict[str, Any]]] = {
    "sam": (1, {"alpha": 1.0}),
    "alpha 1.5": (1, {"alpha": 1.5}),
    "three steps": (3, {"alpha": 1.5, "ascent_steps": 3}),
    "ascent_fraction 0.5": (1, {"alpha": 1.0, "ascent_fraction": 0.5}),
    "micro": (1, {"alpha": 1.0, "ascent_scope": "micro"}),
    "stale": (0, {"alpha": 1.0, "perturbation": "stale"}),
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


def _waits_of_a_pass(device: str) -> int:
    """Some models look at their mask, or at positions, on the host."""
    model = tiny_gpt2().to(device)
    ids = torch.randint(200, (16, 16), device=device)
    for _ in range(2):
        with counted_waits() as waits:
            model(input_ids=ids, labels=ids).loss.backward()
            found = waits()
    return found


def _waits_of_our_own(name: str, device: str, plain: float, of_a_pass: int) -> Found:
    passes, method = LOOPS[name]
    own = _waits_of_a_step(device, **method) - plain - passes * of_a_pass
    yield "XSAMTrainer adds to its passes', a step", own, exactly(0), "waits"


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


# --- time and memory -------------------------------------------------------------------------------------------------


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
    "ViT-Ti": (lambda: image_model("vit-ti", "cifar100", 1)[0], at_most(1.5), TOLD),
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
        yield from _speed(device, "vit-small b64", lambda: image_model("vit-small", "digits", 64), TOLD)
    else:
        yield from _speed(device, "ViT-Ti b256 bf16", lambda: image_model("vit-ti", "cifar100", 256), at_most(2.1))


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
        gc.collect()  # a Trainer is in cycles
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
