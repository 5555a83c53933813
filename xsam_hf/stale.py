r"""
Stale ascent: climb along the gradients of earlier updates, which saves the pass that ordinary ascent takes at θ_0.

    ε_t = ρ m_{t−1}/‖m_{t−1}‖                  the ascent; none in the first update
    g_t = ∇L_t(θ_t + ε_t)                      the only pass of the update
    m_t = β m_{t−1} + (1−β) g_t/‖g_t‖          m_0 = 0

and then Eq. 5 to 8 of the paper with v_0 = m_{t−1}/‖m_{t−1}‖ and v_1 = g_t/‖g_t‖.

With β = 0, the last gradient alone: S²-SAM (NeurIPS 2024) and AsyncSAM (arXiv:2503.11147). The average is ours; VaSSO
(arXiv:2309.15639) has one too, of the gradients at θ_t, and takes two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .arguments import XSAMArguments
from .arithmetic import mix_, scale_, zero_unless
from .direction import Arc, nowhere
from .geometry import norm
from .pass_state import PassState, pass_state_of
from .passes import Passes, Stoppable, interrupts_held
from .search import search_alpha
from .state import XSAMState, XSAMUpdate
from .trainable import Weights
from .weights import MovableWeights


@contextmanager
def climbed(theta: MovableWeights, arguments: XSAMArguments, state: XSAMState) -> Iterator[Stoppable]:
    """
    Moves the weights to θ_t + ε_t for the block; at its end they are θ_t again, bit for bit, also when a pass raises.

    Yields:
        [`Stoppable`]: runs the pass, which Ctrl-C may end.
    """
    state.check_average(arguments.perturbation, theta.named, theta.model)
    with interrupts_held() as stoppable, torch.no_grad(), theta.kept():
        theta.climb_along(state.average, arguments.rho)
        with torch.enable_grad():
            yield stoppable


def stale_gradient(
    theta: MovableWeights,
    weights: Weights,
    gradient: Callable[[], Tensor],
    probe: Callable[[], Tensor],
    arguments: XSAMArguments,
    state: XSAMState,
    before: PassState | None,
    *,
    loss_scaling: bool,
    measure: bool,
) -> XSAMUpdate:
    r"""
    Puts $\|g_t\|\,v(\alpha)$ into `p.grad` after a single pass, and g_t into the average.

    A gradient that is not finite does not enter the average. Without a `GradScaler`, which would see it and skip the step, it
    counts as 0.

    Args:
        theta ([`MovableWeights`]): the weights of this update.
        before ([`PassState`], *optional*):
            What the pass started from, if it ran before this call, within [`climbed`]; its gradient is in `p.grad` then.
        weights, gradient, probe, arguments, state, loss_scaling, measure: see `xsam_gradient`.

    Returns:
        [`XSAMUpdate`]: its loss is L(θ_t + ε_t); what it would take a pass at θ_t to know is NaN.
    """
    if before is not None:
        passes = Passes(gradient, probe, before)
        loss = passes.first()
    else:
        try:
            with climbed(theta, arguments, state) as stoppable:
                passes = Passes(gradient, probe, pass_state_of(weights, arguments, state))
                loss = stoppable(passes.first)
                _ = passes.repeatable  # looked at before the weights go back
        except BaseException:
            theta.drop_gradients()
            raise
    with torch.no_grad():
        g, others = theta.gradients()
        size, begun = norm(g), not state.average.keys().isdisjoint(theta.names)
        fell_back = torch.zeros_like(size, dtype=torch.bool)
        if not loss_scaling:
            finite = torch.isfinite(size + norm(others) if others else size)
            zero_unless(finite, [*g, *others])
            fell_back = ~finite
        average = [
            state.average.setdefault(name, torch.zeros_like(part)) for name, part in zip(theta.names, g, strict=True)
        ]
        arc, search = Arc(lambda: average, g, size), None
        if begun and arguments.searches and state.search_due and passes.repeatable:
            search = _search(arc, theta, passes, arguments)
            state.remember(search, again=nowhere(size, guarded=not loss_scaling))
        alpha = state.alpha if arguments.alpha is None else arguments.alpha
        psi = arc.psi if begun and measure else torch.full_like(size, torch.nan)
        c, d = arc.coefficients(alpha) if begun else (0.0, 1.0)
        mix_(g, average, c, d, arguments.stale_decay, size)
        absent = [part for name, part in state.average.items() if name not in theta.names]
        if absent:  # weights without a gradient in this update
            scale_(absent, arguments.stale_decay)
    unknown = torch.full_like(size, torch.nan)
    return XSAMUpdate(loss, unknown, alpha, psi, unknown, size, fell_back, search)


def _search(arc: Arc, theta: MovableWeights, passes: Passes, arguments: XSAMArguments):
    with passes.repeated(theta):
        point = arc.points(arguments.radius)

        def loss_at(a: float, b: float) -> Tensor:
            theta.move_to(*point(a, b))
            return passes.loss(theta)

        return search_alpha(loss_at, arc.psi, arguments.alphas, arguments.radius)
