"""
The two-dimensional test function of the XSAM paper (§5.1 and D.1), and where SGD, SAM and XSAM go on it.

    L(μ, σ) = −log( 0.7 exp(−K_1/1.8²) + 0.3 exp(−K_2/1.2²) ),  K_i = log(σ_i/σ) + (σ² + (μ−μ_i)²)/(2σ_i²) − ½     Eq. 9, 10

with (μ_1, σ_1) = (20, 30) and (μ_2, σ_2) = (−20, 10). It has a sharp minimum and a flat one, which is slightly higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import XSAMArguments
from ..geometry import slerp
from ..state import XSAMState
from ..xsam import xsam_gradient


SHARP, FLAT = (-16.80, 12.80), (19.80, 29.90)
START = (-10.0, 25.0)
MU, SIGMA = (-30.0, 30.0), (5.0, 40.0)  # the starts of the basin map
STEPS, LEARNING_RATE, MOMENTUM = 400, 20.0, 0.9

METHODS = {
    "SGD": XSAMArguments(rho=0),
    "SAM": XSAMArguments(rho=5, alpha=1),
    "XSAM": XSAMArguments(rho=5, rho_max=10, alpha_search_steps=1),
}


def loss(points: Tensor) -> Tensor:
    """L of points (μ, σ), which are the last dimension; not finite where σ ≤ 0."""
    mu, sigma = points[..., 0], points[..., 1]

    def divergence(mean: float, deviation: float) -> Tensor:
        """K_i, the Kullback-Leibler divergence of N(μ, σ²) from N(μ_i, σ_i²)."""
        return torch.log(deviation / sigma) + (sigma**2 + (mu - mean) ** 2) / (2 * deviation**2) - 0.5

    flat = math.log(0.7) - divergence(20, 30) / 1.8**2
    sharp = math.log(0.3) - divergence(-20, 10) / 1.2**2
    return -torch.logaddexp(flat, sharp)


@dataclass
class Trajectory:
    """
    One descent.

    Args:
        points (`torch.Tensor`): θ before each step and after the last, of shape (steps + 1, 2).
        alphas (`list[float]`): α of each step.
    """

    points: Tensor
    alphas: list[float]


def descend(start: tuple[float, float], arguments: XSAMArguments, steps: int = STEPS) -> Trajectory:
    """One descent by `xsam_gradient` and SGD with momentum (Fig. 3a); α is searched at every step."""
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=LEARNING_RATE, momentum=MOMENTUM)
    state, points, alphas = XSAMState(), [theta.detach().clone()], []

    def gradient() -> Tensor:
        value = loss(theta)
        value.backward()
        return value.detach()

    for _ in range(steps):
        optimizer.zero_grad()
        seen = xsam_gradient([theta], gradient, lambda: loss(theta), arguments, state)
        optimizer.step()
        points.append(theta.detach().clone())
        alphas.append(seen.alpha)
    return Trajectory(torch.stack(points), alphas)


def descend_all(starts: Tensor, arguments: XSAMArguments, steps: int = STEPS) -> Tensor:
    """
    Where [`descend`] ends from many starts, all at a time: a call of `xsam_gradient` is one descent's, and 375 of them take minutes.

    Args:
        starts (`torch.Tensor`): of shape (n, 2).
        arguments ([`XSAMArguments`]): one of `METHODS`, or with another `rho`, `rho_max` or grid; α is 1 or searched.

    Returns:
        `torch.Tensor`: of shape (n, 2); not finite for a descent that left the domain.
    """
    theta, alpha = starts.double().clone(), torch.ones(len(starts), dtype=torch.float64)
    optimizer = torch.optim.SGD([theta], lr=LEARNING_RATE, momentum=MOMENTUM)
    for _ in range(steps):
        theta.grad, alpha = _directions(theta, arguments, alpha)
        optimizer.step()
    return theta


def _directions(theta: Tensor, arguments: XSAMArguments, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """
    ‖g_1‖ v(α) of every row (Eq. 5 to 8 for k = 1), and α.

    As in `xsam_gradient` g_0 stands in for a g_1 that is not finite, and a search without a finite loss keeps α.
    """
    first = _gradients(theta)
    if arguments.rho == 0:
        return first, alpha
    v0 = first / first.norm(dim=1, keepdim=True)
    last = _gradients(theta + arguments.rho * v0)
    last = torch.where(last.isfinite().all(1, keepdim=True), last, first)
    if arguments.alpha == 1:
        return last, alpha
    size = last.norm(dim=1, keepdim=True)
    v1 = last / size
    psi = 2 * torch.atan2((v0 - v1).norm(dim=1), (v0 + v1).norm(dim=1))

    def v(alphas: Tensor) -> Tensor:
        a, b = slerp(alphas, psi)
        return a[..., None] * v0 + b[..., None] * v1

    grid = torch.tensor(arguments.alphas, dtype=torch.float64)
    heights = loss(theta + arguments.radius * v(grid[:, None]))  # of shape (alphas, n)
    finite = heights.isfinite()
    best = grid[torch.where(finite, heights, -torch.inf).argmax(0)]
    alpha = torch.where(finite.any(0), best, alpha)
    return size * v(alpha), alpha


def _gradients(points: Tensor) -> Tensor:
    points = points.detach().requires_grad_()
    return torch.autograd.grad(loss(points).sum(), points)[0]


@dataclass
class Basins:
    """
    Which minimum each of a grid of starts ends at.

    Args:
        mu, sigma (`torch.Tensor`): the axes of the grid.
        flat (`dict[str, torch.Tensor]`):
            By method, of shape (mu, sigma): 1 where the end is nearer to the flat minimum, 0 where it is nearer to the sharp
            one, NaN where the descent left the domain.
    """

    mu: Tensor
    sigma: Tensor
    flat: dict[str, Tensor]

    def share(self, method: str) -> float:
        """How many of all starts end at the flat minimum."""
        return float(self.flat[method].nan_to_num(0).mean())

    def as_json(self) -> dict[str, Any]:
        """
        The map: `mu`, `sigma`; by method `share`, and `flat`, whose rows are those of one μ: 1, 0, or null off the domain.
        """
        ends = {
            name: [[None if math.isnan(end) else int(end) for end in row] for row in of.tolist()]
            for name, of in self.flat.items()
        }
        share = {name: self.share(name) for name in self.flat}
        return {"mu": self.mu.tolist(), "sigma": self.sigma.tolist(), "share": share, "flat": ends}


def basins(columns: int = 25, rows: int = 15, steps: int = STEPS) -> Basins:
    """The basin map: `columns` × `rows` starts over μ ∈ [−30, 30], σ ∈ [5, 40], by every method of `METHODS`."""
    mu, sigma = (torch.linspace(*ends, count, dtype=torch.float64) for ends, count in ((MU, columns), (SIGMA, rows)))
    starts = torch.cartesian_prod(mu, sigma)
    ends = {name: descend_all(starts, arguments, steps) for name, arguments in METHODS.items()}
    return Basins(mu, sigma, {name: _is_flat(points).reshape(columns, rows) for name, points in ends.items()})


def _is_flat(points: Tensor) -> Tensor:
    to_flat, to_sharp = ((points - torch.tensor(minimum)).norm(dim=-1) for minimum in (FLAT, SHARP))
    return torch.where(points.isfinite().all(-1), (to_flat < to_sharp).double(), torch.nan)
