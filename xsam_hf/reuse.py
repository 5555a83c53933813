"""Updates without an ascent that turn their gradient as the last XSAM update was turned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import dot, local, norm


# After LookSAM (Liu et al. 2022, arXiv:2203.02714), which keeps the part of SAM's gradient that is orthogonal to the plain one
# and adds a tuned multiple of it. Here angle and length are those that the last XSAM update measured, so nothing is tuned. They are
# between the displacement and g_k: with `ascent_fraction`, `asam` or several steps the displacement is not along the whole batch's
# gradient, which is turned in the updates between, and the turn is an approximation.


def turn_of(gradient: Sequence[Tensor], displacement: Sequence[Tensor], displacement_norm: Tensor) -> list[Tensor]:
    r"""
    Where v(α) is turned to: u in $v(\alpha) = \cos(\alpha\psi)\, v_0 + \sin(\alpha\psi)\, u$ (Eq. 6, v_0 and v_1 made orthogonal).

    Args:
        gradient (`Sequence[torch.Tensor]`): g_k, left as it is.
        displacement (`Sequence[torch.Tensor]`): θ_k − θ_0, this process's part of it, left as it is.
        displacement_norm (`torch.Tensor`): ‖θ_k − θ_0‖ of the whole, 0-dim.

    Returns:
        `list[torch.Tensor]`: u, a unit vector orthogonal to v_0; 0 where the two are parallel.
    """
    along = dot(gradient, displacement) / displacement_norm.square()
    sideways = [g.clone() for g in gradient]
    for u, e in zip(local(sideways), displacement, strict=True):
        u.sub_(e * along)
    size = norm(sideways)
    torch._foreach_mul_(local(sideways), torch.where(size > 0, 1 / size, torch.zeros_like(size)))
    return sideways


def turn(gradient: Sequence[Tensor], sideways: Sequence[Tensor], angle: Tensor, ratio: Tensor) -> None:
    r"""
    Turns g by an angle towards u and stretches it: $g \leftarrow r\,\|g\|\,(\cos\varphi\, \hat g + \sin\varphi\, \hat u)$, in place.

    Args:
        gradient (`Sequence[torch.Tensor]`): g.
        sideways (`Sequence[torch.Tensor]`): u; its part along g is taken off first.
        angle (`torch.Tensor`): φ, in radians, 0-dim.
        ratio (`torch.Tensor`): r, ‖g_k‖/‖g_0‖ of the update that u is from, 0-dim.
    """
    size = norm(gradient)
    along = dot(sideways, gradient) / size.square()
    # ‖u − (u·ĝ)ĝ‖ from the two products: no vector is made for it.
    rest = (dot(sideways, sideways) - along.square() * size.square()).clamp_min(0).sqrt()
    b = torch.where(rest > 0, torch.sin(angle) * size / rest, torch.zeros_like(size))
    torch._foreach_mul_(local(gradient), ratio * (torch.cos(angle) - b * along))
    for g, u in zip(local(gradient), local(sideways), strict=True):
        g.add_(u * (ratio * b))
