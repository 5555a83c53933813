"""The loss over a plane through θ_0: that of an ascent's gradients, or a random one (Fig. 1, 5 to 10 and 15 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers.utils import logging

from ..geometry import norm
from .arc import unit
from .checked import check_count, check_length
from .random_directions import random_direction
from .surface import Moving, Surface, check_surface, dot


@dataclass
class Plane:
    """
    The loss over a plane, at θ_0 + x e_1 + y e_2.

    Args:
        x, y (`list[float]`): the grid.
        losses (`list[list[float]]`): by y, then x.
        loss (`float`): L(θ_0), at (0, 0).
        spanned_by (`str`): `"gradients"`, `"arc"` or `"random"`.
        points (`list`): θ_0 … θ_k as (x, y), seen from above where they lie outside of the plane.
        gradients (`list`): the directions of g_0 … g_k as (x, y), of length 1 if they lie in the plane.
        radius (`float`, *optional*): ρ_max.
    """

    x: list[float]
    y: list[float]
    losses: list[list[float]]
    loss: float
    spanned_by: str
    points: list[tuple[float, float]] = field(default_factory=list)
    gradients: list[tuple[float, float]] = field(default_factory=list)
    radius: float | None = None


def plane(
    surface: Surface, rho: float, ascent_steps: int = 1, radius: float | None = None, spanned_by: str = "gradients",
    samples: int = 21,
) -> Plane:  # fmt: skip
    """
    The plane of an ascent. e_1 and e_2 are an orthonormal basis of it, so that distances are those between weights.

    Args:
        surface ([`Surface`]): the batches are one update's.
        rho (`float`), ascent_steps (`int`): k steps of length ρ/k along the normalised gradient.
        radius (`float`, *optional*): ρ_max, of the circle; 2ρ by default. The grid reaches a quarter beyond.
        spanned_by (`str`, *optional*): `"gradients"`: g_0 and g_1; `"arc"`: v_0 and v_1, the displacement and g_k.
        samples (`int`, *optional*): points of the grid on each axis, a forward pass for each of them.

    Raises:
        `ValueError`: a value is out of range, or the two vectors are parallel and span no plane.
    """
    check_surface(surface)
    check_length("rho", rho)
    check_count("ascent_steps", ascent_steps)
    if spanned_by not in ("gradients", "arc"):
        raise ValueError(f"`spanned_by` is {spanned_by!r}: choose 'gradients' or 'arc'.")
    radius = 2 * rho if radius is None else radius
    _check("radius", radius, samples)
    with surface.moving() as theta:
        gradients, terms = [theta.gradient], []
        for _ in range(ascent_steps):
            terms.append((unit(gradients[-1]), rho / ascent_steps))
            gradients.append(theta.gradient_at(*terms)[1])
        if spanned_by == "gradients":
            first, second = gradients[:2]
        else:
            first, second = _sum(terms), gradients[-1]
        basis = _orthonormal(first, second)
        coordinates = np.linspace(-1.25 * radius, 1.25 * radius, samples)
        losses = _grid(theta, basis, coordinates, "plane")
        steps = np.array([[length * dot(e, step) for e in basis] for step, length in terms])
        points = np.vstack([np.zeros(2), steps.cumsum(0)])
        arrows = [(dot(basis[0], g), dot(basis[1], g)) for g in map(unit, gradients)]
        at = coordinates.tolist()
        return Plane(at, at, losses, theta.loss, spanned_by, [(x, y) for x, y in points.tolist()], arrows, radius)


def landscape(surface: Surface, reach: float = 1.0, samples: int = 21, seed: int = 0) -> Plane:
    """
    The plane of two random directions, each filter of which is as long as the filter of θ_0 (Li et al. 2018, arXiv:1712.09913).

    Args:
        surface ([`Surface`]): in evaluation mode, as there.
        reach (`float`, *optional*, defaults to 1.0): the grid is [−reach, reach]², in filters' lengths.
        samples (`int`, *optional*): points on each axis, a forward pass for each of them; odd, or θ_0 is not one of them.
        seed (`int`, *optional*): the same one gives checkpoints of one model the same directions before the scaling.

    Raises:
        `ValueError`: a value is out of range.
    """
    check_surface(surface)
    _check("reach", reach, samples)
    with surface.moving() as theta:
        basis = [random_direction(theta.weights, "filter", 2 * seed + i) for i in range(2)]
        coordinates = np.linspace(-reach, reach, samples)
        losses = _grid(theta, basis, coordinates, "landscape")
        return Plane(coordinates.tolist(), coordinates.tolist(), losses, theta.loss, "random")


def _check(name: str, length: float, samples: int) -> None:
    check_length(name, length)
    check_count("samples", samples, least=2)


def _grid(theta: Moving, basis: Sequence[list[Tensor]], at: np.ndarray, name: str) -> list[list[float]]:
    first, second = basis
    rows = logging.tqdm(at, desc=name, leave=False)
    return [[theta.loss_at((first, float(x)), (second, float(y))) for x in at] for y in rows]


def _sum(terms: Sequence[tuple[list[Tensor], float]]) -> list[Tensor]:
    parts = [[length * part for part in step] for step, length in terms]
    return [sum(same[1:], same[0]) for same in zip(*parts, strict=True)]


def _orthonormal(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[list[Tensor]]:
    e1, towards = unit(first), unit(second)
    along = dot(e1, towards)
    rest = [b - along * a for a, b in zip(e1, towards, strict=True)]
    if not float(norm(rest)) > 1e-5:
        raise ValueError("The two vectors are parallel, so that they span no plane: choose a longer `rho`.")
    return [e1, unit(rest)]
