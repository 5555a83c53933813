"""The loss along XSAM's arc, and along the gradients at θ_0 and at θ_1 (Fig. 2, 11, 12 and 13 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..arguments import XSAMArguments
from ..geometry import angle, norm, slerp
from ..search import AlphaSearch
from ..state import XSAMState
from ..xsam import xsam_gradient
from .checked import check_lengths
from .surface import Moving, Surface, check_surface


@dataclass
class ArcProfile:
    """
    L(θ_0 + r v(α)) over α, for one or more radii r.

    Args:
        loss (`float`): L(θ_0).
        last_loss (`float`): L(θ_k).
        rho (`float`), ascent_steps (`int`): how θ_k was reached.
        searches (`list[AlphaSearch]`): one for each radius (`rho_max`), with its curve and α*.
    """

    loss: float
    last_loss: float
    rho: float
    ascent_steps: int
    searches: list[AlphaSearch]


def arc_profile(surface: Surface, arguments: XSAMArguments, radii: Sequence[float] | None = None) -> ArcProfile:
    """
    Looks along the arc as one update of XSAM does, by `xsam_gradient` itself.

    Args:
        surface ([`Surface`]): the batches are one update's.
        arguments ([`XSAMArguments`]): `rho`, `ascent_steps`, and the grid of α.
        radii (`Sequence[float]`, *optional*): `rho_max` by default. In the 2-norm of all trained weights.

    Raises:
        `ValueError`: `rho` is 0, or the ascent follows gradients of earlier updates, which weights alone do not tell; or a
            radius is no length.
    """
    check_surface(surface)
    if not isinstance(arguments, XSAMArguments):
        raise TypeError(f"`arguments` is a {type(arguments).__name__}: give XSAMArguments(rho=0.05), for instance.")
    if arguments.rho == 0:
        raise ValueError("`rho` is 0, so that there is no ascent and no arc: give a length.")
    if arguments.perturbation not in ("sam", "asam"):
        raise ValueError(
            f"`perturbation` is {arguments.perturbation!r}, which follows the gradients of earlier updates: choose 'sam' or 'asam'."
        )
    if radii is None:
        radii = [arguments.radius]
    check_lengths("radii", radii)
    updates = []
    for radius in map(float, radii):
        asked = replace(arguments, rho_max=radius, alpha=None, direction="arc")
        with surface.kept() as before:
            updates.append(
                xsam_gradient(
                    surface.weights, surface.gradient, surface.probe, asked, XSAMState(), ascend=True, before=before
                )
            )
    searches = [update.search for update in updates if update.search is not None]
    first = updates[0]
    return ArcProfile(float(first.loss), float(first.last_loss), arguments.rho, arguments.ascent_steps, searches)


@dataclass
class DirectionGain:
    """
    The loss at some distances r from θ_0 along g_0, along g_1 and along v(α*), batch by batch.

    Args:
        rhos (`list[float]`): length of the ascent to θ_1, where g_1 is taken.
        distances (`list[float]`): r. Both in the 2-norm of all trained weights.
        loss (`list[float]`): L(θ_0) of each batch.
        first (`list`), last (`list`), best (`list`): L(θ_0 + r·direction), by ρ, batch and distance.
    """

    rhos: list[float]
    distances: list[float]
    loss: list[float]
    first: list[list[list[float]]]
    last: list[list[list[float]]]
    best: list[list[list[float]]]

    def share(self, higher: str, lower: str) -> np.ndarray:
        """The share of batches in which the loss along one direction is higher, of shape (ρ, distances)."""
        return (np.array(getattr(self, higher)) > np.array(getattr(self, lower))).mean(1)

    def gain(self, direction: str) -> np.ndarray:
        """Mean over batches of L(θ_0 + r·direction) − L(θ_0), of shape (ρ, distances)."""
        return (np.array(getattr(self, direction)) - np.array(self.loss)[:, None]).mean(1)


def direction_gain(
    model: Trainer | nn.Module,
    batches: Sequence[Mapping[str, Any]],
    rhos: Sequence[float],
    distances: Sequence[float],
    alphas: Sequence[float] = tuple(np.linspace(0, 2, 11)),
) -> DirectionGain:
    """
    Checks Proposition 1: at a large enough distance the loss is higher along g_1 than along g_0, and along v(α*) than along g_1.

    Args:
        model, batches: see [`Surface`]; each batch is looked at alone, in train mode, as an update does.
        rhos, distances (`Sequence[float]`): see [`DirectionGain`].
        alphas (`Sequence[float]`): where α* is looked for.

    Raises:
        `ValueError`: there is no batch, or one of the lengths or of `alphas` is none.
    """
    if not len(batches):
        raise ValueError("There is no batch to measure the gain on: give at least one.")
    check_lengths("rhos", rhos)
    check_lengths("distances", distances)
    if not len(alphas) or not np.isfinite(alphas).all():
        raise ValueError(f"`alphas` is {list(alphas)}: give one finite number or more.")
    found = DirectionGain(list(rhos), list(distances), [], [], [], [])
    for along in (found.first, found.last, found.best):
        along += [[] for _ in rhos]
    for batch in logging.tqdm(batches, desc="gain", leave=False):
        with Surface(model, [batch], training=True).moving() as theta:
            found.loss.append(theta.loss)
            g0 = unit(theta.gradient)
            first = [theta.loss_at((g0, r)) for r in distances]  # the same for every ρ
            for i, rho in enumerate(rhos):
                g1 = unit(theta.gradient_at((g0, rho))[1])
                found.first[i].append(first)
                found.last[i].append([theta.loss_at((g1, r)) for r in distances])
                found.best[i].append([_highest(theta, g0, g1, r, alphas) for r in distances])
    return found


def _highest(theta: Moving, v0: list[Tensor], v1: list[Tensor], radius: float, alphas: Sequence[float]) -> float:
    one = torch.ones((), device=v0[0].device)
    psi = angle(v0, v1, one, one)
    points = [slerp(alpha, psi) for alpha in alphas]
    return float(np.nanmax([theta.loss_at((v0, radius * float(a)), (v1, radius * float(b))) for a, b in points]))


def unit(x: Sequence[Tensor]) -> list[Tensor]:
    """x/‖x‖; a vector of length 0 stays as it is."""
    size = norm(x)
    return [part / torch.where(size > 0, size, torch.ones_like(size)).to(part.dtype) for part in x]
