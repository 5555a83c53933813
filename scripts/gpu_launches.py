"""What `gpu_check` asks of what the host has to do: how often it waits for the device, and how many kernels it launches."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.checks import TOLD, Found, at_least, at_most, each, exactly, needs_a_gpu
from scripts.gpu_numbers import METHODS, network
from scripts.gpu_training import language_model_training, tiny_gpt2
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
        return next(losses)

    losses = cycle(torch.zeros(8, device=device).unbind())  # each pass's is a number of its own

    def update() -> float:
        clock.start()
        xsam_gradient(weights, gradient, lambda: next(losses), arguments, state, measure=measure)
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
