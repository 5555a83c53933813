"""Move weights and put them back bit for bit; keep running statistics; replay random numbers."""

from __future__ import annotations

import random
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .geometry import local


def perturbed_and_excluded(
    weights: nn.Module | Iterable[Tensor], rho_exclude: Sequence[str] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """
    The trainable weights: those that are perturbed, and those that `rho_exclude` keeps where they are.

    Raises:
        `ValueError`: none is left to perturb, a pattern is in no name, or there are no names.
    """
    if not rho_exclude:
        trained: Iterable[Tensor] = weights.parameters() if isinstance(weights, nn.Module) else weights
        # A tied weight may be listed twice.
        perturbed, excluded = list(dict.fromkeys(w for w in trained if w.requires_grad)), list[Tensor]()
    else:
        if not isinstance(weights, nn.Module):
            raise ValueError("`rho_exclude` looks for names, and plain tensors have none: give the model.")
        named: dict[str, Tensor] = {
            name: weight for name, weight in weights.named_parameters() if weight.requires_grad
        }
        for pattern in rho_exclude:
            if not any(re.search(pattern, name) for name in named):
                raise ValueError(
                    f"`rho_exclude` is {pattern!r}, which no name of a trainable weight contains: give part of a name such as "
                    f"{next(iter(named), 'classifier.bias')!r}."
                )
        excluded = [w for name, w in named.items() if any(re.search(pattern, name) for pattern in rho_exclude)]
        perturbed = [w for name, w in named.items() if not any(re.search(pattern, name) for pattern in rho_exclude)]
    if not perturbed:
        raise ValueError(
            "No weight requires a gradient and is not excluded: there is nothing to perturb. Unfreeze some of the model."
        )
    return perturbed, excluded


def take_gradient(weights: Sequence[Tensor], moved: dict[Tensor, None]) -> list[Tensor]:
    """
    The gradients of all weights in `moved`, to which those that have one for the first time are added.

    A weight may have a gradient in some passes only (layer drop, mixtures of experts): in the others it is zero. One that
    never has any stays without, as in plain training, where the optimizer passes it over.

    Raises:
        `ValueError`: no weight has a gradient.
        `NotImplementedError`: a gradient is sparse.
    """
    for weight in weights:
        if weight.grad is not None:
            if weight.grad.is_sparse:
                raise NotImplementedError(
                    "A gradient is sparse and XSAM needs dense ones: build the embedding with `sparse=False`."
                )
            moved[weight] = None
    if not moved:
        raise ValueError("No weight received a gradient: does the loss depend on the trainable weights?")
    for weight in moved:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return [weight.grad for weight in moved if weight.grad is not None]


def drop_gradient(weights: Sequence[Tensor]) -> None:
    """Frees the gradients of all weights."""
    for weight in weights:
        weight.grad = None


@contextmanager
def interrupts_held() -> Iterator[Callable[[Callable[[], Tensor]], Tensor]]:
    """
    Holds Ctrl-C back, so that it falls into no restore: it comes through in passes, and at the end of the block.

    For the whole block and not only around a restore: an interrupt may also fall between a failing pass and the first line
    of its `finally`. Python handles signals in the main thread alone, so that there is nothing to hold in others.

    Yields:
        `Callable`: runs a pass, which Ctrl-C may end.
    """
    earlier = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(earlier):
        yield lambda one_pass: one_pass()
        return
    in_pass = waiting = False

    def on_interrupt(number, frame) -> None:
        nonlocal waiting
        waiting = not in_pass
        if in_pass:
            earlier(number, frame)

    def stoppable(one_pass: Callable[[], Tensor]) -> Tensor:
        nonlocal in_pass
        in_pass = True
        try:
            if waiting:
                signal.raise_signal(signal.SIGINT)
            return one_pass()
        finally:
            # Python looks for signals at calls and jumps back: there are none between the pass and this line.
            in_pass = False

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stoppable
    finally:
        signal.signal(signal.SIGINT, earlier)
        if waiting:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def weights_kept(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """
    Gives a copy of the weights and writes it back at the end, bit for bit, also when an exception ends the block.

    The copy is written back in place (`copy_`): storage, and with it DDP's buckets, FSDP's shards, compiled graphs and tied
    weights, stays where it is. Subtracting the displacement again would not do: (w + e) − e is not w in floating point.

    Yields:
        `list[torch.Tensor]`: the copy, this process's part of each weight. One parameter-sized buffer.
    """
    shards = local(weights)
    origin = [shard.clone() for shard in shards]
    try:
        yield origin
    finally:
        torch._foreach_copy_(shards, origin)


def park(origin: list[Tensor]) -> None:
    """Moves a copy of the weights to the CPU, one tensor after the other, in place of the list's own."""
    for i, part in enumerate(origin):
        origin[i] = part.to("cpu", copy=True)


@contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """
    Restores what a model's forward passes count and average (BatchNorm, spectral norm, codebooks) at the end of the block.

    These then move in the first pass of an update only, at θ_0, as in plain training: all buffers of floating-point numbers
    and counters. Others are constants, or the frozen weights of a quantised model, which are too large to copy for nothing.
    Setting BatchNorm's `momentum = 0` instead, as reference implementations do, would still advance
    `num_batches_tracked` and turn an infinite activation into NaN.
    """
    buffers = [] if module is None else [b for b in module.buffers() if b.is_floating_point() or b.numel() == 1]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@dataclass(frozen=True)
class RandomState:
    """
    The state of Python's, NumPy's, PyTorch's and the current accelerator's generators.

    Every pass of an update must draw the same dropout masks: with independent masks the search for α follows the noise.
    """

    python: tuple
    numpy: dict
    torch: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """Reads the generators without advancing them."""
        device = _device_module()
        state = None if device is None else device.get_rng_state()
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), state)

    def restore(self) -> None:
        """Sets the generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.device is not None:
            _device_module().set_rng_state(self.device)


def _device_module():
    """`torch.cuda`, `torch.mps` ... if that device is in use; asking one that is not would wake it up."""
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return module if getattr(module, "is_initialized", lambda: True)() else None
