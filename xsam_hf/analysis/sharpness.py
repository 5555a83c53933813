"""How much higher the loss is around θ_0: on average (Fig. 16 of the paper), and at worst, as SAM's objective has it (Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..geometry import norm
from .arc import unit
from .checked import check_count, check_length, check_lengths
from .random_directions import random_direction
from .surface import Surface, check_surface


@dataclass
class AverageSharpness:
    """
    L(θ_0 + r d) − L(θ_0) for random directions d.

    Args:
        radii (`list[float]`): r, as a share of each filter's (or element's) size.
        normalisation (`str`): `"filter"` or `"element"`.
        loss (`float`): L(θ_0).
        samples (`list[list[float]]`): by direction, then radius.
    """

    radii: list[float]
    normalisation: str
    loss: float
    samples: list[list[float]]

    @property
    def mean(self) -> np.ndarray:
        """By radius."""
        return np.mean(self.samples, axis=0)

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean, by radius; NaN for a single direction."""
        n = len(self.samples)
        return np.std(self.samples, axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(self.radii), np.nan)

    @property
    def convergence(self) -> np.ndarray:
        """The mean over the first 1, 2, … directions, of shape (directions, radii)."""
        return np.cumsum(self.samples, axis=0) / np.arange(1, len(self.samples) + 1)[:, None]


def average_sharpness(
    surface: Surface,
    radii: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    directions: int = 50,
    normalisation: str = "filter",
    seed: int = 0,
) -> AverageSharpness:
    """
    The mean rise of the loss over random directions; 250 of them were enough for the paper's curves to settle.

    Args:
        surface ([`Surface`]): in evaluation mode, as the paper measures it.
        radii (`Sequence[float]`, *optional*): see [`AverageSharpness`]; a forward pass for each and each direction.
        directions (`int`, *optional*, defaults to 50): how many.
        normalisation (`str`, *optional*, defaults to `"filter"`): see [`random_direction`].
        seed (`int`, *optional*): the same one gives checkpoints of one model the same directions before the scaling.
    """
    check_surface(surface)
    check_count("directions", directions)
    check_lengths("radii", radii)
    samples: list[list[float]] = []
    with surface.moving() as theta:
        for i in logging.tqdm(range(directions), desc="sharpness", leave=False):
            theta.back()  # the direction is scaled to θ_0
            direction = random_direction(theta.weights, normalisation, seed + i)
            samples.append([theta.loss_at((direction, float(r))) - theta.loss for r in radii])
        return AverageSharpness(list(map(float, radii)), normalisation, theta.loss, samples)


def ascent_sharpness(surface: Surface, rho: float, steps: int = 5) -> float:
    """
    max L(θ_0 + δ) − L(θ_0) over ‖δ‖ ≤ ρ, as far as gradient ascent gets: the highest of the points that it passes.

    Each step is ρ/2 long along the normalised gradient (the first ρ), and is taken back onto the ball where it leads outside.

    Args:
        surface ([`Surface`]): see there.
        rho (`float`): in the 2-norm of all trained weights.
        steps (`int`, *optional*, defaults to 5): a pass for each of them; 1 is the rise that SAM sees.
    """
    check_surface(surface)
    check_length("rho", rho)
    check_count("steps", steps)
    with surface.moving() as theta:
        delta, gradient, highest = [torch.zeros_like(w) for w in theta.weights], theta.gradient, -np.inf
        for step in range(steps):
            length = rho if step == 0 else rho / 2
            delta = [d + length * u for d, u in zip(delta, unit(gradient), strict=True)]
            size = float(norm(delta))
            if size > rho:
                delta = [d * (rho / size) for d in delta]
            if step == steps - 1:
                highest = max(highest, theta.loss_at((delta, 1.0)))
            else:
                loss, gradient = theta.gradient_at((delta, 1.0))
                highest = max(highest, loss)
        return highest - theta.loss


def m_sharpness(
    model: Trainer | nn.Module, batches: Sequence[Mapping[str, Any]], rho: float, steps: int = 1
) -> list[float]:
    """
    [`ascent_sharpness`] of each batch of m examples by itself, whose mean is the m-sharpness (Foret et al. 2021, section 4.1).

    Args:
        model, batches: see [`Surface`].
        rho (`float`), steps (`int`, *optional*, defaults to 1): see [`ascent_sharpness`].
    """
    if not len(batches):
        raise ValueError("There is no batch to measure the sharpness on: give at least one.")
    return [
        ascent_sharpness(Surface(model, [batch]), rho, steps)
        for batch in logging.tqdm(batches, desc="m-sharpness", leave=False)
    ]
