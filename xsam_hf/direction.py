"""Where to descend: the coefficients of the displacement θ_k − θ_0 and of the last gradient g_k in the update."""

from __future__ import annotations

from torch import Tensor

from .geometry import slerp


def arc(alpha: float, psi: Tensor, displacement_norm: Tensor, gradient_norm: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    XSAM's direction $\|g_k\|\,v(\alpha)$ (Eq. 8) as $c\,(\theta_k - \theta_0) + d\,g_k$.

    With (a, b) the slerp coefficients of Eq. 6: $c = a\,\|g_k\|/\|\theta_k - \theta_0\|$ and $d = b$. At α = 1 these are
    exactly 0 and 1, SAM's gradient untouched.

    Args:
        alpha (`float`): position on the arc; 0 = against the displacement, 1 = SAM.
        psi (`torch.Tensor`): angle between the displacement and g_k, in radians.
        displacement_norm (`torch.Tensor`): ‖θ_k − θ_0‖, 2-norm over all trainable weights.
        gradient_norm (`torch.Tensor`): ‖g_k‖, likewise.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: c and d, 0-dim.
    """
    first, second = slerp(alpha, psi)
    return first * gradient_norm / displacement_norm, second


DIRECTIONS = {"arc": arc}
