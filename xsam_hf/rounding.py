"""Weights in half precision: most of a small step is lost when it is rounded to the nearest number; rounding at random keeps it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import local


_HALF = (torch.float16, torch.bfloat16)


def add_rounded(
    weights: Sequence[Tensor],
    terms: Sequence[tuple[Sequence[Tensor], float | Tensor]],
    generator: torch.Generator | None = None,
) -> None:
    r"""
    $\theta \leftarrow \theta + \sum a x$, in place. In half precision the sum is made in float32 and rounded once.

    Args:
        weights (`Sequence[torch.Tensor]`): θ.
        terms (`Sequence[tuple]`): the vectors x and their factors a.
        generator (`torch.Generator`, *optional*):
            Rounds half precision up or down at random, so that the mean is exact; without one, to the nearest.
    """
    for weight, *parts in zip(local(weights), *(local(x) for x, _ in terms), strict=True):
        half = weight.dtype in _HALF
        value = weight.float() if half else weight
        for part, (_, a) in zip(parts, terms, strict=True):
            if isinstance(a, Tensor):
                value.add_(part * a)
            else:
                value.add_(part, alpha=a)
        if half:
            weight.copy_(value if generator is None else _round_at_random(value, weight.dtype, generator))


def _round_at_random(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """To one of the two nearest numbers, each as often as it is near; numbers that need no rounding stay."""
    nearest = value.to(dtype)
    error = value - nearest.float()
    # The bit patterns of floating-point numbers of one sign are in the order of their size.
    outwards = (error > 0) == (nearest > 0)
    other = (nearest.view(torch.int16) + torch.where(outwards, 1, -1).to(torch.int16)).view(dtype)
    gap = (other.float() - nearest.float()).abs()
    random = torch.rand(value.shape, generator=generator, device=generator.device).to(value.device)
    return torch.where((nearest != 0) & (random * gap < error.abs()), other, nearest)
