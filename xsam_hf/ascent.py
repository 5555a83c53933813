"""Where to climb: one ascent step from a gradient. Each function turns the gradient into the step, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import local, norm


def sam(gradient: Sequence[Tensor], length: float) -> Tensor:
    r"""
    SAM's ascent step $\varepsilon = \ell\, g/\|g\|$ (§2.1 of the XSAM paper; Foret et al. 2021, arXiv:2010.01412).

    A gradient of norm 0 gives a step of 0, decided on the device: no host synchronisation.

    Args:
        gradient (`Sequence[torch.Tensor]`): g, overwritten by ε.
        length (`float`): ℓ, the 2-norm of the step over all trainable weights (ρ/k).

    Returns:
        `torch.Tensor`: ‖g‖, 0-dim.
    """
    size = norm(gradient)
    torch._foreach_mul_(local(gradient), torch.where(size > 0, length / size, torch.zeros_like(size)))
    return size


ASCENTS = {"sam": sam}
