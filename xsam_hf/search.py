"""Which direction on the arc leads to the highest loss: the search for α, forward passes only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .geometry import slerp


# A curve of pure noise ranges over less than this many times its roughness (the standard deviation of its second differences)
# in 95 of 100 cases, for 21 points (simulated with Gaussian noise).
_NOISE = 2.25

# Losses this many rounding errors of their size apart are equal: a sum over micro-batches has that much from its order alone.
_TIE = 8


@dataclass
class AlphaSearch:
    """
    One search: the grid `alphas`, the `losses` L(θ_0 + ρ_max v(α)) on it, and the winner.

    Args:
        alphas (`list[float]`): the grid, in ascending order.
        losses (`list[float]`): the loss at each of them.
        alpha (`float`, *optional*): the α of the highest loss; `None` if no loss was finite, all were equal, or all was noise.
        angle (`float`): ψ, the angle between v_0 and v_1, in radians.
        rho_max (`float`): radius of the search, in the 2-norm of all perturbed weights.
        noise (`float`):
            The range that noise of the curve's roughness has, as a share of the curve's range; above 1 there is nothing to
            find. 0 where it cannot be told: fewer than nine points.
    """

    alphas: list[float]
    losses: list[float]
    alpha: float | None
    angle: float
    rho_max: float
    noise: float = 0.0

    @property
    def gain(self) -> float | None:
        """L at α* − L at α = 1 (SAM's direction; interpolated on the grid); `None` where that is not defined."""
        if self.alpha is None or not self.alphas[0] <= 1 <= self.alphas[-1]:
            return None
        gain = self.losses[self.alphas.index(self.alpha)] - float(np.interp(1.0, self.alphas, self.losses))
        return gain if math.isfinite(gain) else None

    @property
    def at_edge(self) -> bool:
        """Whether the winner is an end of the grid: the maximum may lie beyond it."""
        return self.alpha in (self.alphas[0], self.alphas[-1])


def search_alpha(
    loss_at: Callable[[float, float], Tensor], psi: Tensor, alphas: Sequence[float], rho_max: float
) -> AlphaSearch:
    r"""
    Finds $\alpha^* = \arg\max_\alpha L(\theta_0 + \rho_{max} v(\alpha))$ (Eq. 7) on a grid. The first maximum wins.

    A loss that is not finite never wins. Losses that differ from the highest by rounding alone are as high, so that the order
    of a sum does not decide. Nothing wins where all losses are equal or, in a departure from Eq. 7, where their range is
    below the curve's noise.

    Args:
        loss_at (`Callable`): the loss at θ_0 + ρ_max (a v_0 + b v_1) for coefficients (a, b), a 0-dim tensor.
        psi (`torch.Tensor`): angle between v_0 and v_1, in radians, 0-dim.
        alphas (`Sequence[float]`): the grid.
        rho_max (`float`): radius of the search; only recorded here.

    Raises:
        `ValueError`: the losses are one and the same tensor.
    """
    angle = psi.cpu().double()
    points = [slerp(alpha, angle) for alpha in alphas]
    # One read of all losses at the end: the probes run without waiting for each other's result.
    found = [loss_at(float(a), float(b)) for a, b in points]
    if found[0].data_ptr() == found[-1].data_ptr():
        raise ValueError(
            "`probe` returned the same tensor at every point, so that there is nothing to search: let it compute the loss anew each time."
        )
    losses = torch.stack(found)
    # Losses in half precision are on a coarse grid of their own, on which equal numbers are equal anyway.
    precision = torch.finfo(losses.dtype if losses.dtype == torch.float64 else torch.float32).eps
    seen = losses.tolist()
    finite = [loss for loss in seen if math.isfinite(loss)]
    noise, winner = _noise(finite), None
    if finite:
        tie = _TIE * precision * max(abs(loss) for loss in finite)
        flat = len(finite) > 1 and max(finite) - min(finite) <= tie
        if not flat and noise <= 1:
            high = max(finite) - tie
            winner = next(
                alpha for alpha, loss in zip(alphas, seen, strict=True) if math.isfinite(loss) and loss >= high
            )
    return AlphaSearch(list(alphas), seen, winner, float(angle), rho_max, noise)


def _noise(losses: Sequence[float]) -> float:
    """`_NOISE` times the roughness of the losses over their range; the curve itself has next to no second differences."""
    if len(losses) < 9 or np.ptp(losses) == 0:
        return 0.0
    return float(_NOISE * np.diff(losses, 2).std() / np.ptp(losses))
