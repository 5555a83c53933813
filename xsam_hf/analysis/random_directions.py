"""Random directions in which each filter, or each element, is as large as the weights' own (Li et al. 2018, arXiv:1712.09913)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


NORMALISATIONS = ("filter", "element")


def random_direction(weights: Sequence[Tensor], normalisation: str, seed: int) -> list[Tensor]:
    """
    A Gaussian direction, scaled to the weights, that no other random stream notices.

    Args:
        weights (`Sequence[torch.Tensor]`): θ_0.
        normalisation (`str`):
            `"filter"`: each filter, a row of a weight's first dimension, gets the norm of the weights' filter. `"element"`: each
            element is multiplied by the weights' element. Biases and norm layers (one dimension) stay, as there.
        seed (`int`): the same one gives the same direction.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"`normalisation` is {normalisation!r}: choose one of {', '.join(NORMALISATIONS)}.")
    generator = torch.Generator().manual_seed(seed)
    return [_scaled(torch.randn(w.shape, generator=generator).to(w), w.detach(), normalisation) for w in weights]


def _scaled(direction: Tensor, weight: Tensor, normalisation: str) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(direction)
    if normalisation == "element":
        return direction * weight
    rows, sizes = direction.flatten(1), weight.flatten(1).norm(dim=1, keepdim=True)
    return (rows * (sizes / rows.norm(dim=1, keepdim=True))).view_as(weight)
