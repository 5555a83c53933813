"""Which direction on the arc leads to the highest loss: the search for α, forward passes only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .geometry import slerp


@dataclass
class AlphaSearch:
    """
    One search: the grid `alphas`, the `losses` L(θ_0 + ρ_max v(α)) on it, and the winner.

    Args:
        alphas (`list[float]`): the grid, in ascending order.
        losses (`list[float]`): the loss at each of its points.
        alpha (`float`, *optional*): the α of the highest loss; `None` if no loss was finite.
        angle (`float`): ψ, the angle between v_0 and v_1, in radians.
        rho_max (`float`): radius of the search, in the 2-norm of all trainable weights.
    """

    alphas: list[float]
    losses: list[float]
    alpha: float | None
    angle: float
    rho_max: float

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

    A loss that is not finite never wins.

    Args:
        loss_at (`Callable`): the loss at θ_0 + ρ_max (a v_0 + b v_1) for coefficients (a, b), a 0-dim tensor.
        psi (`torch.Tensor`): angle between v_0 and v_1, in radians, 0-dim.
        alphas (`Sequence[float]`): the grid.
        rho_max (`float`): radius of the search; only recorded here.
    """
    angle = psi.cpu().double()
    points = [slerp(alpha, angle) for alpha in alphas]
    # One read of all losses at the end: the probes run without waiting for each other's result.
    losses = torch.stack([loss_at(float(a), float(b)) for a, b in points]).tolist()
    heights = [loss if math.isfinite(loss) else -math.inf for loss in losses]
    best = max(range(len(heights)), key=heights.__getitem__)
    winner = alphas[best] if math.isfinite(heights[best]) else None
    return AlphaSearch(list(alphas), losses, winner, float(angle), rho_max)
