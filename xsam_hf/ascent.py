"""Where to climb: each function turns a gradient into one ascent step ε, in place, for whole tensors and shards alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import XSAMArguments
from .geometry import local, norm, zero_unless
from .state import XSAMState
from .weights import MovableWeights


def ascent_step(
    gradient: Sequence[Tensor], size: Tensor, theta: MovableWeights, arguments: XSAMArguments, state: XSAMState
) -> None:
    """
    Turns g_i into ε_i, in place, as `perturbation` says.

    Args:
        gradient (`Sequence[torch.Tensor]`): g_i, overwritten by ε_i.
        size (`torch.Tensor`): ‖g_i‖, 2-norm over all perturbed weights, 0-dim.
        theta ([`MovableWeights`]): θ_i, to which the gradient belongs.
        arguments ([`XSAMArguments`]): the step is ρ/k long.
        state ([`XSAMState`]): the running average of `vasso` and `fsam`, updated in place.
    """
    length = arguments.rho / arguments.ascent_steps
    if arguments.perturbation == "sam":
        sam(gradient, size, length)
    elif arguments.perturbation == "asam":
        asam(gradient, theta.weights, length, arguments.asam_eta, arguments.asam_scope)
    elif arguments.perturbation == "vasso":
        vasso(gradient, size, theta.names, state.average, length, arguments.vasso_decay)
    else:
        fsam(gradient, size, theta.names, state.average, length, arguments.fsam_sigma, arguments.fsam_lambda)


def sam(gradient: Sequence[Tensor], size: Tensor, length: float) -> None:
    r"""
    SAM: $\varepsilon = \ell\, g/\|g\|$ (§2.1 of the XSAM paper; Foret et al. 2021, arXiv:2010.01412).

    A gradient of norm 0 gives a step of 0, decided on the device: no host synchronisation.

    Args:
        gradient (`Sequence[torch.Tensor]`): g, overwritten by ε.
        size (`torch.Tensor`): ‖g‖, 2-norm over all perturbed weights, 0-dim.
        length (`float`): ℓ, the 2-norm of the step over all perturbed weights (ρ/k).
    """
    torch._foreach_mul_(local(gradient), torch.where(size > 0, length / size, torch.zeros_like(size)))


def asam(
    gradient: Sequence[Tensor], weights: Sequence[Tensor], length: float, eta: float, scope: str = "weights"
) -> None:
    r"""
    ASAM: $\varepsilon = \ell\, T^2 g/\|T g\|$ with $T = \mathrm{diag}(|\theta| + \eta)$ (Kwon et al. 2021, arXiv:2102.11600).

    The step has the length ℓ in the norm $\|T^{-1}\varepsilon\|$, so that ρ means a share of the weights' size. The name of a
    weight does not tell what it is, so `scope="weights"` scales those of two dimensions or more and takes T = 1 for the
    others, biases and norms, as the authors' code does.

    Args:
        gradient (`Sequence[torch.Tensor]`): g, overwritten by ε.
        weights (`Sequence[torch.Tensor]`): θ, at which g was taken.
        length (`float`): ℓ (ρ/k).
        eta (`float`): η.
        scope (`str`, *optional*, defaults to `"weights"`): or `"all"`.
    """
    triples = zip(weights, local(gradient), local(weights), strict=True)
    pairs = [(g, w) for weight, g, w in triples if scope == "all" or weight.ndim > 1]
    for g, w in pairs:
        g.mul_(w.abs().add_(eta))
    size = norm(gradient)
    for g, w in pairs:
        g.mul_(w.abs().add_(eta))
    sam(gradient, size, length)


def vasso(
    gradient: Sequence[Tensor],
    size: Tensor,
    names: Sequence[str],
    average: dict[str, Tensor],
    length: float,
    decay: float,
) -> None:
    r"""
    VaSSO: $\varepsilon = \ell\, d/\|d\|$ along $d \leftarrow (1-\varphi)\, d + \varphi\, g_0$ (Li & Giannakis 2023, arXiv:2309.15639).

    A gradient that is not finite leaves the average as it is, and gives a step that is not finite.

    Args:
        gradient (`Sequence[torch.Tensor]`): g_0, overwritten by ε.
        size (`torch.Tensor`): ‖g_0‖, 0-dim.
        names (`Sequence[str]`): the names of the weights.
        average (`dict[str, torch.Tensor]`):
            d of each weight, updated in place. That of a weight which is not in it starts as the weight's gradient, so
            that the first step is SAM's (as 0, should the gradient not be finite).
        length (`float`): ℓ = ρ, 2-norm over all perturbed weights.
        decay (`float`): φ; 1 is SAM.
    """
    finite = torch.isfinite(size)
    if len(_begin(average, names, gradient, finite)) == len(names):
        return sam(gradient, size, length)
    for g, d in zip(local(gradient), local([average[name] for name in names]), strict=True):
        d.lerp_(torch.where(finite, g, d), decay)
        g.copy_(torch.where(finite, d, g))
    sam(gradient, norm(gradient), length)


def fsam(
    gradient: Sequence[Tensor],
    size: Tensor,
    names: Sequence[str],
    average: dict[str, Tensor],
    length: float,
    sigma: float,
    decay: float,
) -> None:
    r"""
    Friendly SAM: along $g_0 - \sigma m$, then $m \leftarrow \lambda m + (1-\lambda)\, g_0$ (Li et al. 2024, arXiv:2403.12350).

    In this order, as in the authors' code: the gradient is compared with its past. A gradient that is not finite leaves the
    average as it is.

    Args:
        gradient (`Sequence[torch.Tensor]`): g_0, overwritten by ε.
        size (`torch.Tensor`): ‖g_0‖, 0-dim.
        names (`Sequence[str]`): the names of the weights.
        average (`dict[str, torch.Tensor]`):
            m of each weight, updated in place. That of a weight which is not in it starts as the weight's gradient, and
            nothing is subtracted yet: the first step is SAM's (m starts as 0, should the gradient not be finite).
        length (`float`): ℓ = ρ, 2-norm over all perturbed weights.
        sigma (`float`): σ; 0 is SAM.
        decay (`float`): λ.
    """
    finite = torch.isfinite(size)
    begun = _begin(average, names, gradient, finite)
    if len(begun) == len(names):
        return sam(gradient, size, length)
    for name, g, m in zip(names, local(gradient), local([average[name] for name in names]), strict=True):
        if name in begun:
            continue
        new = torch.lerp(m, torch.where(finite, g, m), 1 - decay)
        g.sub_(m, alpha=sigma)
        m.copy_(new)
    sam(gradient, norm(gradient), length)


def _begin(average: dict[str, Tensor], names: Sequence[str], gradient: Sequence[Tensor], finite: Tensor) -> set[str]:
    """Starts the averages that are not there yet with the gradient, or with 0 if it is not finite; returns their names."""
    begun = {name: g.clone() for name, g in zip(names, gradient, strict=True) if name not in average}
    zero_unless(finite, list(begun.values()))
    average |= begun
    return set(begun)
