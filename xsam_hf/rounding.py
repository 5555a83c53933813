"""Weights in half precision: a small step is lost in rounding unless it is kept beside them, or rounded at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import dot, local, norm


DTYPES = ("weights", "float32", "stochastic")
_HALF = (torch.float16, torch.bfloat16)


def half_precision(weights: Sequence[Tensor]) -> bool:
    """Whether some of the weights are in float16 or bfloat16."""
    return any(weight.dtype in _HALF for weight in weights)


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


def climb(
    weights: Sequence[Tensor],
    step: Sequence[Tensor],
    dtype: str,
    displacement: dict[Tensor, Tensor],
    origin: dict[Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    r"""
    $\theta_{i+1} = \theta_i + \varepsilon_i$, in place.

    Args:
        weights (`Sequence[torch.Tensor]`): θ_i.
        step (`Sequence[torch.Tensor]`): ε_i.
        dtype (`str`):
            `"weights"`: rounded to the nearest. `"stochastic"`: at random. `"float32"`: all steps are added up in float32
            and rounded as one.
        displacement (`dict[torch.Tensor, torch.Tensor]`): for `"float32"`, the sum of the steps of each weight, updated.
        origin (`dict[torch.Tensor, torch.Tensor]`): θ_0, this process's part.
        generator (`torch.Generator`): for `"stochastic"`.
    """
    if dtype == "weights":
        torch._foreach_add_(local(weights), local(step))
    elif dtype == "stochastic":
        add_rounded(weights, [(step, 1.0)], generator)
    else:
        for weight in weights:
            if weight not in displacement:
                wide = torch.promote_types(weight.dtype, torch.float32)
                displacement[weight] = torch.zeros_like(weight, dtype=wide)
        kept = [displacement[weight] for weight in weights]
        add_rounded(kept, [(step, 1.0)])
        torch._foreach_copy_(local(weights), [origin[weight] for weight in weights])
        add_rounded(weights, [(kept, 1.0)])


def kept_share(step: Sequence[Tensor], moved: Sequence[Tensor], origin: dict[Tensor, Tensor]) -> Tensor:
    r"""
    What is left of a step once the weights are rounded: $(\theta_1 - \theta_0) \cdot \varepsilon_0 / \|\varepsilon_0\|^2$; 1 is all.

    Args:
        step (`Sequence[torch.Tensor]`): ε_0.
        moved (`Sequence[torch.Tensor]`): θ_1.
        origin (`dict[torch.Tensor, torch.Tensor]`): θ_0, this process's part.
    """
    return (dot(step, moved) - dot(step, [origin[weight] for weight in moved])) / norm(step).square()


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
