"""Where to climb: each function makes the direction of one ascent step from a gradient, in place, and gives its factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import XSAMArguments
from .arithmetic import average_, copy_, multiply_by_sizes_, zero_unless
from .geometry import norm
from .state import XSAMState
from .weights import MovableWeights


def ascent_step(
    gradient: Sequence[Tensor], size: Tensor, theta: MovableWeights, arguments: XSAMArguments, state: XSAMState
) -> Tensor:
    r"""
    Makes the direction of ε_i from g_i, in place, as `perturbation` says.

    Args:
        gradient (`Sequence[torch.Tensor]`): g_i, overwritten by the direction.
        size (`torch.Tensor`): ‖g_i‖, 2-norm over all perturbed weights, 0-dim.
        theta ([`MovableWeights`]): θ_i, to which the gradient belongs.
        arguments ([`XSAMArguments`]): the step is ρ/k long.
        state ([`XSAMState`]): the running average of `vasso` and `fsam`, updated in place.

    Returns:
        `torch.Tensor`: the factor that makes the direction ε_i, 0-dim.
    """
    length = arguments.rho / arguments.ascent_steps
    if arguments.perturbation == "sam":
        return sam(size, length)
    if arguments.perturbation == "asam":
        return asam(gradient, theta.weights, length, arguments.asam_eta, arguments.asam_scope)
    state.check_average(arguments.perturbation, theta.named, theta.model)
    if arguments.perturbation == "vasso":
        return vasso(gradient, size, theta.names, state.average, length, arguments.vasso_decay)
    return fsam(gradient, size, theta.names, state.average, length, arguments.fsam_sigma, arguments.fsam_lambda)


def sam(size: Tensor, length: float) -> Tensor:
    r"""
    SAM: $\varepsilon = \ell\, g/\|g\|$ (§2.1 of the XSAM paper; Foret et al. 2021, arXiv:2010.01412).

    A gradient of norm 0 gives a step of 0, decided on the device: no host synchronisation.

    Args:
        size (`torch.Tensor`): ‖g‖, 2-norm over all perturbed weights, 0-dim.
        length (`float`): ℓ, the 2-norm of the step over all perturbed weights (ρ/k).

    Returns:
        `torch.Tensor`: ℓ/‖g‖, the factor of g.
    """
    return torch.where(size > 0, length / size, torch.zeros_like(size))


def asam(
    gradient: Sequence[Tensor], weights: Sequence[Tensor], length: float, eta: float, scope: str = "weights"
) -> Tensor:
    r"""
    ASAM: $\varepsilon = \ell\, T^2 g/\|T g\|$ with $T = \mathrm{diag}(|\theta| + \eta)$ (Kwon et al. 2021, arXiv:2102.11600).

    The step has the length ℓ in the norm $\|T^{-1}\varepsilon\|$, so that ρ means a share of the weights' size. The name of a
    weight does not tell what it is, so `scope="weights"` scales those of two dimensions or more and takes T = 1 for the
    others, biases and norms, as the authors' code does.

    Args:
        gradient (`Sequence[torch.Tensor]`): g, overwritten by T² g.
        weights (`Sequence[torch.Tensor]`): θ, at which g was taken.
        length (`float`): ℓ (ρ/k).
        eta (`float`): η.
        scope (`str`, *optional*, defaults to `"weights"`): or `"all"`.

    Returns:
        `torch.Tensor`: ℓ/‖T g‖, the factor of T² g.
    """
    scaled = [i for i, weight in enumerate(weights) if scope == "all" or weight.ndim > 1]
    g, w = ([vector[i] for i in scaled] for vector in (gradient, weights))
    multiply_by_sizes_(g, w, eta)
    size = norm(gradient)
    multiply_by_sizes_(g, w, eta)
    return sam(size, length)


def vasso(
    gradient: Sequence[Tensor],
    size: Tensor,
    names: Sequence[str],
    average: dict[str, Tensor],
    length: float,
    decay: float,
) -> Tensor:
    r"""
    VaSSO: $\varepsilon = \ell\, d/\|d\|$ along $d \leftarrow (1-\varphi)\, d + \varphi\, g_0$ (Li & Giannakis 2023, arXiv:2309.15639).

    A gradient that is not finite leaves the average as it is, and gives a step that is not finite.

    Args:
        gradient (`Sequence[torch.Tensor]`): g_0, overwritten by d.
        size (`torch.Tensor`): ‖g_0‖, 0-dim.
        names (`Sequence[str]`): the names of the weights.
        average (`dict[str, torch.Tensor]`):
            d of each weight, updated in place. A weight that has none yet starts with its gradient, so that the first step is
            SAM's; with 0 if the gradient is not finite.
        length (`float`): ℓ = ρ, 2-norm over all perturbed weights.
        decay (`float`): φ; 1 is SAM.

    Returns:
        `torch.Tensor`: ℓ/‖d‖, the factor of d.
    """
    finite = torch.isfinite(size)
    if len(_begin(average, names, gradient, finite)) == len(names):
        return sam(size, length)
    d = [average[name] for name in names]
    average_(d, gradient, decay, finite)
    copy_(gradient, d)
    return torch.where(finite, sam(norm(gradient), length), size * torch.nan)


def fsam(
    gradient: Sequence[Tensor],
    size: Tensor,
    names: Sequence[str],
    average: dict[str, Tensor],
    length: float,
    sigma: float,
    decay: float,
) -> Tensor:
    r"""
    Friendly SAM: along $g_0 - \sigma m$, then $m \leftarrow \lambda m + (1-\lambda)\, g_0$ (Li et al. 2024, arXiv:2403.12350).

    In this order, as in the authors' code: the gradient is compared with its past. A gradient that is not finite leaves the
    average as it is.

    Args:
        gradient (`Sequence[torch.Tensor]`): g_0, overwritten by g_0 − σ m.
        size (`torch.Tensor`): ‖g_0‖, 0-dim.
        names (`Sequence[str]`): the names of the weights.
        average (`dict[str, torch.Tensor]`):
            m of each weight, updated in place. A weight that has none yet starts with its gradient, and nothing is subtracted
            from that: the first step is SAM's. With 0 if the gradient is not finite.
        length (`float`): ℓ = ρ, 2-norm over all perturbed weights.
        sigma (`float`): σ; 0 is SAM.
        decay (`float`): λ.

    Returns:
        `torch.Tensor`: ℓ/‖g_0 − σ m‖, the factor of g_0 − σ m.
    """
    finite = torch.isfinite(size)
    begun = _begin(average, names, gradient, finite)
    if len(begun) == len(names):
        return sam(size, length)
    known = [i for i, name in enumerate(names) if name not in begun]
    average_([average[names[i]] for i in known], [gradient[i] for i in known], 1 - decay, finite, less=sigma)
    return sam(norm(gradient), length)


def _begin(average: dict[str, Tensor], names: Sequence[str], gradient: Sequence[Tensor], finite: Tensor) -> set[str]:
    """Starts the averages that are not there yet with the gradient, or with 0 if it is not finite; returns their names."""
    begun = {name: g.clone() for name, g in zip(names, gradient, strict=True) if name not in average}
    zero_unless(finite, list(begun.values()))
    average |= begun
    return set(begun)
