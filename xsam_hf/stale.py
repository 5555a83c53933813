r"""
Stale ascent: climb along the gradients of the updates before, which saves the second pass.

    ε_t = ρ m_{t−1}/‖m_{t−1}‖        the step up; none in the first update
    g_t = ∇L_t(θ_t + ε_t)            the only pass of the update
    m_t = β m_{t−1} + (1−β) g_t/‖g_t‖

and then Eq. 5 to 8 with v_0 = m_{t−1}/‖m_{t−1}‖ and v_1 = g_t/‖g_t‖.

With β = 0, the last gradient alone: S²-SAM (NeurIPS 2024) and AsyncSAM (arXiv:2503.11147). The average is ours; VaSSO
(arXiv:2309.15639) takes one too, and two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .arguments import XSAMArguments
from .arithmetic import mix_
from .direction import Arc
from .geometry import norm
from .passes import Passes, interrupts_held
from .search import search_alpha
from .state import XSAMState, XSAMUpdate
from .weights import MovableWeights


@contextmanager
def climbed(
    theta: MovableWeights, arguments: XSAMArguments, state: XSAMState
) -> Iterator[Callable[[Callable[[], Tensor]], Tensor]]:
    """
    Moves the weights to θ + ε for the block, and back bit for bit, also when a pass raises; see [`Passes.repeated`].

    Yields:
        `Callable`: runs the pass, which Ctrl-C may end.
    """
    with interrupts_held() as stoppable, torch.no_grad(), theta.kept():
        theta.climb_along(state.average, arguments.rho)
        with torch.enable_grad():
            yield stoppable


def stale_gradient(
    theta: MovableWeights, passes: Passes, arguments: XSAMArguments, state: XSAMState, ran: bool, measure: bool
) -> XSAMUpdate:
    r"""
    Puts $\|g_t\|\,v(\alpha)$ into `p.grad` after a single pass; the loss of the update is L(θ + ε).

    A gradient that is not finite is left as it is, as in plain training, and does not enter the average.

    Args:
        theta ([`MovableWeights`]), passes ([`Passes`]), arguments ([`XSAMArguments`]), state ([`XSAMState`]): as in `xsam_gradient`.
        ran (`bool`): whether the pass ran before, at the moved weights; its gradient is in `p.grad` then.
        measure (`bool`): as in `xsam_gradient`.
    """
    if ran:
        loss = passes.first()
    else:
        try:
            with climbed(theta, arguments, state) as stoppable:
                loss = stoppable(passes.first)
        except BaseException:
            theta.drop_gradients()
            raise
    g, _ = theta.gradients()
    with torch.no_grad():
        size = norm(g)
        begun = any(name in state.average for name in theta.names)
        average = [
            state.average.setdefault(name, torch.zeros_like(part)) for name, part in zip(theta.names, g, strict=True)
        ]
        arc, radius, search = Arc(lambda: average, g, size), arguments.radius, None
        psi = arc.psi if measure and begun else torch.full_like(size, torch.nan)
        if begun and arguments.searches and state.search_due and passes.repeatable:
            psi = arc.psi
            with passes.repeated(theta):
                point = arc.points(radius)

                def loss_at(a: float, b: float) -> Tensor:
                    theta.move_to(*point(a, b))
                    return passes.loss(theta)

                search = search_alpha(loss_at, psi, arguments.alphas, radius)
            state.remember(search)
        alpha = state.alpha if arguments.alpha is None else arguments.alpha
        c, d = arc.coefficients(alpha) if begun else (0.0, 1.0)
        mix_(g, average, c, d, arguments.stale_decay, size)
    return XSAMUpdate(loss, loss, alpha, psi, size, size, torch.zeros_like(size, dtype=torch.bool), search)
