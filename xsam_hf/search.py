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


@dataclass
class AlphaSearch:
    """
    One search: the grid `alphas`, the `losses` L(θ_0 + ρ_max v(α)) on it, and the winner.

    Args:
        alphas (`list[float]`): the grid, in ascending order; for a golden search those of its points that were probed.
        losses (`list[float]`): the loss at each of them.
        alpha (`float`, *optional*): the α of the highest loss; `None` if no loss was finite, all were equal, or all was noise.
        angle (`float`): ψ, the angle between v_0 and v_1, in radians.
        rho_max (`float`): radius of the search, in the 2-norm of all perturbed weights.
        noise (`float`): what the losses' roughness alone can pass for, as a share of their range; above 1 there is nothing
            to find. 0 where it cannot be told: fewer than nine points, or not all of the grid.
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
    loss_at: Callable[[float, float], Tensor],
    psi: Tensor,
    alphas: Sequence[float],
    rho_max: float,
    method: str = "grid",
    smoothing: bool = False,
) -> AlphaSearch:
    r"""
    Finds $\alpha^* = \arg\max_\alpha L(\theta_0 + \rho_{max} v(\alpha))$ (Eq. 7) on a grid. The first maximum wins.

    A loss that is not finite never wins, and nothing wins where all losses are equal or their range is below the curve's noise.

    Args:
        loss_at (`Callable`): the loss at θ_0 + ρ_max (a v_0 + b v_1) for coefficients (a, b), a 0-dim tensor.
        psi (`torch.Tensor`): angle between v_0 and v_1, in radians, 0-dim.
        alphas (`Sequence[float]`): the grid.
        rho_max (`float`): radius of the search; only recorded here.
        method (`str`, *optional*, defaults to `"grid"`): `"golden"` probes few of the points; see [`peak`].
        smoothing (`bool`, *optional*, defaults to `False`):
            Compare the values of parabolas fitted around each point. Golden searches then take the whole grid.
    """
    angle = psi.cpu().double()
    seen: dict[int, float] = {}

    def probe(wanted: Sequence[int]) -> None:
        new = [i for i in wanted if i not in seen]
        points = [slerp(alphas[i], angle) for i in new]
        if new:
            # One read of all losses at the end: the probes run without waiting for each other's result.
            losses = torch.stack([loss_at(float(a), float(b)) for a, b in points]).tolist()
            seen.update(zip(new, losses, strict=True))

    def height(i: int) -> float:
        probe([i])
        return seen[i] if math.isfinite(seen[i]) else -math.inf

    best = peak(height, len(alphas)) if method == "golden" and not smoothing else None
    if best is None:
        probe(range(len(alphas)))
        heights = [height(i) for i in range(len(alphas))]
        if smoothing:
            heights = _smooth(heights)
        best = max(range(len(heights)), key=heights.__getitem__)
    probed = sorted(seen)
    noise = _noise([seen[i] for i in probed]) if len(probed) == len(alphas) else 0.0
    finite = [loss for loss in seen.values() if math.isfinite(loss)]
    flat = len(finite) > 1 and min(finite) == max(finite)
    winner = alphas[best] if finite and not flat and noise <= 1 else None
    return AlphaSearch([alphas[i] for i in probed], [seen[i] for i in probed], winner, float(angle), rho_max, noise)


def peak(height: Callable[[int], float], n: int) -> int | None:
    """
    The index of the maximum of a sequence with a single peak by Fibonacci search, golden-section search on a grid.

    Every step narrows the bracket by the golden ratio with one new point; both ends are probed too, to see a second peak
    there. For n = 21 that makes 9 points at most.

    Args:
        height (`Callable`): the value at an index from 0 to n − 1.
        n (`int`): length of the sequence.

    Returns:
        `int`, *optional*: the index; `None` if the points that were probed do not rise to one peak and fall after it.

    Source: Kiefer 1953, "Sequential minimax search for a maximum".
    """
    seen = {0: height(0), n - 1: height(n - 1)}

    def value(i: int) -> float:
        if i >= n:  # the bracket is a Fibonacci number long and may stick out of the grid
            return -math.inf
        if i not in seen:
            seen[i] = height(i)
        return seen[i]

    small, large = 1, 1
    while small + large < n + 1:
        small, large = large, small + large
    low = -1  # the maximum lies strictly between low and low + small + large
    while large > 1:
        if value(low + small) < value(low + large):
            low += small
        small, large = large - small, small
    best = max(sorted(seen), key=seen.__getitem__)
    heights = [seen[i] for i in sorted(seen)]
    top = heights.index(seen[best])
    if (
        heights[top] == -math.inf
        or heights[: top + 1] != sorted(heights[: top + 1])
        or heights[top:] != sorted(heights[top:], reverse=True)
    ):
        return None
    return best


def _noise(losses: Sequence[float]) -> float:
    """`_NOISE` times the roughness of the losses over their range; the curve itself has next to no second differences."""
    finite = np.array([loss for loss in losses if math.isfinite(loss)])
    if len(finite) < 9 or np.ptp(finite) == 0:
        return 0.0
    return float(_NOISE * np.diff(finite, 2).std() / np.ptp(finite))


def _smooth(heights: Sequence[float]) -> list[float]:
    """The value at each point of the least-squares parabola through the half of the grid around it (Savitzky & Golay 1964)."""
    y = np.array(heights)
    width = min(len(y), max(5, len(y) // 2 + 1))
    smooth = y.copy()
    for i in (int(i) for i in np.flatnonzero(np.isfinite(y))):
        first = min(max(i - width // 2, 0), len(y) - width)
        around = first + np.flatnonzero(np.isfinite(y[first : first + width]))
        if len(around) > 3:
            smooth[i] = np.polyval(np.polyfit(around - i, y[around], 2), 0)
    return smooth.tolist()
