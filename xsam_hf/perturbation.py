"""Move weights and put them back bit for bit; keep BatchNorm's statistics; replay random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .geometry import local


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


@contextmanager
def batch_norm_kept(module: nn.Module | None) -> Iterator[None]:
    """
    Restores the running statistics of every BatchNorm layer at the end of the block.

    They then move in the first pass of an update only, at θ_0, as in plain training. Setting `momentum = 0` instead, as
    reference implementations do, would still advance `num_batches_tracked` and turn an infinite activation into NaN.
    """
    layers = [] if module is None else [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@dataclass(frozen=True)
class RandomState:
    """
    The state of Python's, NumPy's, PyTorch's and the current CUDA device's generators.

    Every pass of an update must draw the same dropout masks: with independent masks the search for α follows the noise.
    """

    python: tuple
    numpy: dict
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """Reads the generators without advancing them."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Sets the generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
