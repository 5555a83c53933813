"""Where to descend, and how far: XSAM's arc, sums of the gradients along the ascent, and the norm of the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import slerp


# Sums of the gradients g_0 ... g_k: the first one taken in, and whether each is divided by its norm.
#   LSAM   Σ_{i=1..k} g_i/‖g_i‖   Mordido et al. 2024 (Lookbehind-SAM, arXiv:2307.16704), as the XSAM paper compares it
#   MSAM   Σ_{i=1..k} g_i         Kim et al. 2023 (arXiv:2302.10181)
#   LSAM+, MSAM+: with g_0 (§5.3 of the XSAM paper)
SUMS = {"lsam": (1, True), "lsam+": (0, True), "msam": (1, False), "msam+": (0, False)}
DIRECTIONS = ("arc", *SUMS)
SCALES = ("last", "first", "mean", "max", "slope", "slope_max")


def arc(alpha: float, psi: Tensor, displacement_norm: Tensor, gradient_norm: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    XSAM's direction $\|g_k\|\,v(\alpha)$ (Eq. 8) as $c\,(\theta_k - \theta_0) + d\,g_k$.

    With (a, b) the slerp coefficients of Eq. 6: $c = a\,\|g_k\|/\|\theta_k - \theta_0\|$ and $d = b$. At α = 1 these are
    exactly 0 and 1, SAM's gradient untouched.

    Args:
        alpha (`float`): position on the arc; 0 = against the displacement, 1 = SAM.
        psi (`torch.Tensor`): angle between the displacement and g_k, in radians.
        displacement_norm (`torch.Tensor`): ‖θ_k − θ_0‖, 2-norm over all perturbed weights.
        gradient_norm (`torch.Tensor`): ‖g_k‖, likewise.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: c and d, 0-dim.
    """
    first, second = slerp(alpha, psi)
    return first * gradient_norm / displacement_norm, second


def share(direction: str, i: int, size: Tensor) -> Tensor | None:
    """
    The factor of g_i in a sum of gradients; `None` if it is not part of it (see `SUMS`).

    Args:
        direction (`str`): one of `DIRECTIONS`; the arc is no sum.
        i (`int`): 0 ... k.
        size (`torch.Tensor`): ‖g_i‖, 2-norm over all perturbed weights.
    """
    first, normalised = SUMS.get(direction, (None, False))
    if first is None or i < first:
        return None
    if not normalised:
        return torch.ones_like(size)
    return torch.where(size > 0, 1 / size, torch.zeros_like(size))


def scale(name: str, norms: Sequence[Tensor], first_loss: Tensor, loss: Tensor, length: Tensor | float) -> Tensor:
    r"""
    The norm that the update's gradient is given (Appendix F).

    `last` ‖g_k‖, `first` ‖g_0‖, `mean` and `max` of ‖g_0‖ ... ‖g_k‖ (the paper's two "simple extensions", whose formulas are
    lost), and the average slopes $(L(\theta_k) - L(\theta_0))/\|\theta_k - \theta_0\|$ and
    $(L(\theta_0 + \rho_{max} v) - L(\theta_0))/\rho_{max}$. Where the loss falls a slope counts as 0: no step.

    Args:
        name (`str`): one of `SCALES`.
        norms (`Sequence[torch.Tensor]`): ‖g_0‖ ... ‖g_k‖, 2-norms over all perturbed weights.
        first_loss (`torch.Tensor`): L(θ_0).
        loss (`torch.Tensor`): the loss at the slope's far end.
        length (`torch.Tensor` or `float`): the distance to it.
    """
    if name == "last":
        return norms[-1]
    if name == "first":
        return norms[0]
    if name in ("mean", "max"):
        values = torch.stack(list(norms))
        return values.mean() if name == "mean" else values.max()
    return ((loss - first_loss) / length).clamp_min(0).to(norms[-1].dtype)
