"""Where to descend, and how far: XSAM's arc, sums of the gradients along the ascent, and the norm of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .arithmetic import add_, copy_, scale_, zero_unless
from .geometry import angle, norm, number, slerp


# Sums of the gradients g_0 ... g_k: the first one taken in, and whether each is divided by its norm.
#   LSAM   Σ_{i=1..k} g_i/‖g_i‖   Mordido et al. 2024 (Lookbehind-SAM, arXiv:2307.16704), as the XSAM paper compares it
#   MSAM   Σ_{i=1..k} g_i         Kim et al. 2023 (arXiv:2302.10181)
#   LSAM+, MSAM+: with g_0 (§5.3 of the XSAM paper)
SUMS = {"lsam": (1, True), "lsam+": (0, True), "msam": (1, False), "msam+": (0, False)}


class Trail:
    """
    What the passes at θ_0 … θ_k find: losses and norms, whether every later gradient was finite, and the sum of gradients.

    Args:
        direction (`str`): `"arc"`, or one of `SUMS`.
        guarded (`bool`):
            A later gradient that is not finite counts as 0 and lets the update fall back; so does one whose loss is not finite
            where L(θ_0) is, as of the logarithm of a negative number. Without a guard it stays in `p.grad`, for a `GradScaler`
            to see.
    """

    def __init__(self, direction: str, guarded: bool):
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []  # ‖g_0‖ … ‖g_k‖, 2-norms over all perturbed weights, 0-dim
        self.finite: Tensor | None = None  # g_1 … g_k, 0-dim
        self._guarded = guarded
        self._summed = SUMS.get(direction)
        self._sum: list[Tensor] = []

    def add(self, loss: Tensor, gradient: list[Tensor], others: Sequence[Tensor], last: bool = False) -> list[Tensor]:
        """
        Takes in the pass at θ_i.

        Args:
            loss (`torch.Tensor`): L(θ_i).
            gradient (`list[torch.Tensor]`): g_i.
            others (`Sequence[torch.Tensor]`): the gradients of weights that do not move.
            last (`bool`): whether i = k. A g_k that is not finite stays as it is until [`or_fall_back`] sets it to 0.

        Returns:
            `list[torch.Tensor]`: g_i.
        """
        i, size = len(self.norms), norm(gradient)
        if self._guarded and i > 0:  # L(θ_0) may be a mean over nothing, whose gradient is 0
            defined = _finite(loss) >= _finite(self.losses[0])
            size = torch.where(defined.to(size.device), size, torch.nan)
        self.losses.append(loss)
        self.norms.append(size)
        if self.finite is None:
            self.finite = torch.ones_like(size, dtype=torch.bool)
        else:
            self.finite = self.finite & _finite(size + norm(others) if others else size)
            if self._guarded:
                zero_unless(self.finite, others if last else [*gradient, *others])
        if self._summed is not None and i >= self._summed[0]:
            factor = torch.ones_like(size)
            if self._summed[1]:
                factor = torch.where(size > 0, 1 / size, torch.zeros_like(size))
            new = gradient[len(self._sum) :]  # a weight may have its first gradient in a later pass
            self._sum += [torch.zeros_like(part) for part in new]
            add_(self._sum, gradient, factor, keep=True)
        return gradient

    def sum_into(self, gradient: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Writes the sum over g_k; returns the factors of the displacement, 0, and of the sum, which give it the norm ‖g_k‖."""
        copy_(gradient, self._sum)
        size = norm(gradient)
        zero = torch.zeros_like(size)
        return zero, torch.where(size > 0, self.norms[-1] / size, zero)

    def or_fall_back(self, c: Tensor | float, d: Tensor | float, arc: Arc) -> tuple[Tensor | float, Tensor | float]:
        """The factors of the displacement and of g_k; ‖g_0‖ v_0 in place of both if a later pass was not finite."""
        assert self.finite is not None
        if not self._guarded or (self.finite.device.type == "cpu" and number(self.finite)):
            return c, d
        zero_unless(self.finite, arc.gradient)  # 0 · NaN would stay NaN
        back = self.norms[0] / arc.displacement_norm
        if isinstance(d, Tensor):
            d = torch.where(self.finite, d, torch.zeros_like(d))
        return torch.where(self.finite, c, back), d

    @property
    def leads_nowhere(self) -> bool:
        """Whether ‖g_0‖ or ‖g_k‖ is 0, as for a batch without labels, or not finite before a `GradScaler`; waits for the device."""
        return nowhere(torch.stack([self.norms[0], self.norms[-1]]), guarded=self._guarded)

    @property
    def fell_back(self) -> Tensor:
        assert self.finite is not None
        return _finite(self.norms[0]) & ~self.finite & self._guarded


def _finite(number: Tensor) -> Tensor:
    """`torch.isfinite` in half as many kernels."""
    return number.abs() < torch.inf


def nowhere(sizes: Tensor, guarded: bool) -> bool:
    """See [`Trail.leads_nowhere`]. Of reduced gradients, so that all processes agree."""
    return bool((sizes == 0).any()) or not (guarded or bool(torch.isfinite(sizes).all()))


class Arc:
    r"""
    The arc through $v_0 = (\theta_k - \theta_0)/\|\theta_k - \theta_0\|$ and $v_1 = g_k/\|g_k\|$ (Eq. 5), parametrised by α (Eq. 6).

    What is not asked for is not computed: SAM's direction, α = 1, needs neither the displacement nor the angle.

    Args:
        displacement (`Callable`): makes θ_k − θ_0, which [`combine`] overwrites.
        gradient (`Sequence[torch.Tensor]`): g_k; likewise.
        gradient_norm (`torch.Tensor`): ‖g_k‖, 2-norm over all perturbed weights, 0-dim.
    """

    def __init__(
        self, displacement: Callable[[], Sequence[Tensor]], gradient: Sequence[Tensor], gradient_norm: Tensor
    ):
        self._displace, self.gradient, self.gradient_norm = displacement, gradient, gradient_norm

    @cached_property
    def displacement(self) -> Sequence[Tensor]:
        return self._displace()

    @cached_property
    def displacement_norm(self) -> Tensor:
        return norm(self.displacement)

    @cached_property
    def psi(self) -> Tensor:
        """The angle between v_0 and v_1 in radians, 0-dim."""
        return angle(self.displacement, self.gradient, self.displacement_norm, self.gradient_norm)

    def points(self, radius: float) -> Callable[[float, float], tuple[tuple[Sequence[Tensor], float], ...]]:
        """Of coefficients (a, b), the terms of radius · (a v_0 + b v_1). Waits for the norms on the device, once."""
        along, across = float(radius / self.displacement_norm), float(radius / self.gradient_norm)
        return lambda a, b: ((self.displacement, along * a), (self.gradient, across * b))

    def coefficients(self, alpha: float) -> tuple[Tensor | float, Tensor | float]:
        r"""
        $c$ and $d$ of $\|g_k\|\,v(\alpha) = c\,(\theta_k - \theta_0) + d\,g_k$ (Eq. 8), 0-dim.

        With (a, b) the slerp coefficients of Eq. 6: $c = a\,\|g_k\|/\|\theta_k - \theta_0\|$ and $d = b$. At α = 1 these are
        exactly 0 and 1, SAM's gradient untouched; α = 0 is the displacement. Where that has the length 0, as of a step too short for
        the weights' dtype, there is no arc: 0 and 1, the gradient at θ_0.
        """
        if alpha == 1:
            return 0.0, 1.0
        first, second = slerp(alpha, self.psi)
        c = first * self.gradient_norm / self.displacement_norm
        there = self.displacement_norm > 0
        return torch.where(there, c, torch.zeros_like(c)), torch.where(there, second, torch.ones_like(second))

    def combine(self, c: Tensor | float, d: Tensor | float) -> None:
        """Writes c (θ_k − θ_0) + d g_k over g_k."""
        if isinstance(d, Tensor) or d != 1:
            scale_(self.gradient, d)
        if isinstance(c, Tensor) or c != 0:
            add_(self.gradient, self.displacement, c)


def rescale(name: str, trail: Trail, arc: Arc, radius: float, loss_along: Callable[[float | Tensor], Tensor]) -> None:
    r"""
    Gives the update's gradient, of norm ‖g_k‖, another norm (Appendix F), in place.

    `first` ‖g_0‖, `mean` and `max` of ‖g_0‖ … ‖g_k‖ (the paper's two "simple extensions", whose formulas are lost), and the
    average slopes $(L(\theta_k) - L(\theta_0))/\|\theta_k - \theta_0\|$ and
    $(L(\theta_0 + \rho_{max} v) - L(\theta_0))/\rho_{max}$. Where the loss falls a slope counts as 0: no step. An update that
    fell back is left as it is, and so is one whose slope is not finite.

    Args:
        name (`str`): one of `GradientScale`; `last` is ‖g_k‖.
        trail ([`Trail`]), arc ([`Arc`]): whose gradient is the update's.
        radius (`float`): ρ_max.
        loss_along (`Callable`): the loss at θ_0 and so many times the update's gradient; for `slope_max`.
    """
    if name == "last":
        return
    norms = trail.norms
    if name == "first":
        wanted = norms[0]
    elif name in ("mean", "max"):
        wanted = torch.stack(norms).mean() if name == "mean" else torch.stack(norms).max()
    else:
        loss, length = trail.losses[-1], arc.displacement_norm
        if name == "slope_max":
            loss, length = loss_along(radius / norm(arc.gradient).clamp_min(1e-30)), torch.full_like(length, radius)
        wanted = ((loss - trail.losses[0]) / length).clamp_min(0).to(norms[-1].dtype)
    assert trail.finite is not None
    ratio = torch.where(norms[-1] > 0, wanted / norms[-1], torch.zeros_like(wanted))
    scale_(arc.gradient, torch.where(trail.finite & torch.isfinite(wanted), ratio, torch.ones_like(ratio)))
