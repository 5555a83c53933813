r"""
XSAM, the algorithm ("Revisiting Sharpness-Aware Minimization: A More Faithful and Effective Implementation", ICLR 2026).

    min_θ max_{‖δ‖≤ρ} L(θ+δ)                                     the objective                                 Eq. 1
    θ_0 = θ,  g_i = ∇L(θ_i),  θ_{i+1} = θ_i + (ρ/k) g_i/‖g_i‖    k ascent steps                                §2.1
    v_0 = (θ_k−θ_0)/‖θ_k−θ_0‖,  v_1 = g_k/‖g_k‖                  the two spanning vectors                      Eq. 5
    v(α) = [sin((1−α)ψ) v_0 + sin(αψ) v_1] / sin ψ               the arc between and beyond them               Eq. 6
    α* = argmax L(θ_0 + ρ_max v(α))                              forward passes on a grid, now and then        Eq. 7
    θ ← θ − η ‖g_k‖ v(α*)                                        the base optimizer's step                     Eq. 8

L is the training loss on one update batch, ‖·‖ the 2-norm over all trainable weights. One departure: a search whose curve is
no more than noise keeps α (`search.py`). Stale ascent, which has no pass at θ_0, is in `stale.py`. Only torch is needed here:
the two callables `gradient` and `probe` are all that this file knows of a training framework.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import XSAMArguments
from .ascent import ascent_step
from .direction import Arc, Trail, rescale
from .geometry import norm
from .inputs import with_weights
from .pass_state import PassState, pass_state_of
from .passes import Passes
from .schedule import follow_schedule
from .search import search_alpha
from .seen import SeenAscent
from .stale import stale_gradient
from .state import XSAMState, XSAMUpdate
from .trainable import Weights
from .weights import MovableWeights


def xsam_gradient(
    weights: Weights,
    gradient: Callable[[], Tensor],
    probe: Callable[[], Tensor],
    arguments: XSAMArguments,
    state: XSAMState,
    *,
    ascend: bool | None = None,
    before: PassState | None = None,
    loss_scaling: bool = False,
    measure: bool = True,
    seen: SeenAscent | None = None,
) -> XSAMUpdate:
    """
    Puts XSAM's direction ‖g_k‖ v(α) (Eq. 8) into `p.grad`, for the base optimizer to step against.

    The weights come back bit for bit, also when a pass raises, and the random-number streams stand where the first pass
    left them. No host synchronisation outside a search, one extra parameter-sized buffer outside a search, two during one;
    a sum of gradients (`lsam` ...) and a running average (`vasso`, `fsam`) take one more each.

    Args:
        weights (`torch.nn.Module`, mapping of names to `torch.Tensor`, or iterable of `torch.Tensor`):
            The model, or the weights to perturb. With a model, every pass starts from the buffers and frozen weights that the
            first one found, and they end as that one left them ([`StateFollower`]); to include a loss with buffers of its own,
            give `nn.ModuleList([model, loss])`. Weights that do not require a gradient are left alone. Those in `rho_exclude`
            (which needs names) are not moved, count in no norm, and get g_k as it is. Give all that the optimizer steps: others
            get the sum of all passes' gradients.
        gradient (`Callable`):
            Adds the update batch's gradient at the current weights to `p.grad` and returns the loss, a 0-dim tensor. Called
            `ascent_steps + 1` times with the same random numbers; once if XSAM is off in this update. With several
            processes every one calls it equally often and sees the same, reduced, gradient, and the mean of the losses.
        probe (`Callable`):
            Returns the same loss, in train mode, without a gradient, and averaged over processes.
        arguments ([`XSAMArguments`]): the method's hyperparameters.
        state ([`XSAMState`]): updated in place; keep it with your checkpoint.
        ascend (`bool`, *optional*):
            Whether XSAM is on in this update, and `state.search_due` says whether α is searched. By default both follow
            the schedules of `arguments`, with `state.updates` for a clock.
        before ([`PassState`], *optional*):
            What the first pass started from, if it ran before this call. The first call of `gradient` then only returns its loss.
        loss_scaling (`bool`, *optional*, defaults to `False`):
            A `GradScaler` scales the loss: a non-finite gradient of any pass is left in `p.grad` for it to see and skip.
            Without one, a later pass of which gradient or loss is not finite falls back to ‖g_0‖ v_0: for `sam` and `ascent_steps=1`
            this is g_0.
            A first gradient that is not finite is left as it is, as in plain training.
        measure (`bool`, *optional*, defaults to `True`):
            Whether to measure the angle between v_0 and v_1. If not, and α = 1 does not need it, it is reported as NaN.
        seen ([`SeenAscent`], *optional*): measures once what a forward pass in half precision sees of the ascent.

    Returns:
        [`XSAMUpdate`]: the loss L(θ_0) and what the update saw. With `rho=0` nothing is done but call `gradient` once.

    Raises:
        `TypeError`: the weights, the arguments or the state are none, or a callable returns no loss.
        `ValueError`: no weight requires a gradient, or received one in a pass; `gradient` returns its first loss again; two share memory; a hyperparameter is out of
            range; `rho_exclude` leaves none or has no names to look at; `state` is another model's; or a schedule is a share of a
            whole that is not known here.
        `NotImplementedError`: a gradient is sparse, or the first pass changed what cannot be put back for the others.
    """
    if not isinstance(arguments, XSAMArguments) or not isinstance(state, XSAMState):
        raise TypeError(
            f"`arguments` is a {type(arguments).__name__} and `state` a {type(state).__name__}: give an XSAMArguments, and an XSAMState that "
            "you keep for all updates."
        )
    arguments.check_method()  # a field may have been set since it was made
    if ascend is None:
        ascend = follow_schedule(arguments, state)
    state.updates += 1
    theta = MovableWeights(weights, arguments, state.updates, state.memory, seen)
    gradient = with_weights(weights, theta, gradient, probe, before, arguments, state, ascend)
    if ascend and arguments.perturbation == "stale":
        return stale_gradient(
            theta, weights, gradient, probe, arguments, state, before, loss_scaling=loss_scaling, measure=measure
        )
    passes = Passes(gradient, probe, before or pass_state_of(weights, arguments, state))
    loss = passes.first()  # L(θ_0), and g_0 = ∇L(θ_0)
    if not (ascend and passes.repeatable):
        return _plain_update(loss, theta, state)

    trail = Trail(arguments.direction, guarded=not loss_scaling)  # what the passes at θ_0 … θ_k find
    with passes.repeated(theta):  # at its end θ_0 comes back, bit for bit
        # Eq. 1, max L(θ+δ), by k ascent steps (§2.1).
        for _ in range(arguments.ascent_steps):
            g = trail.add(loss, *theta.gradients())  # g_i
            factor = ascent_step(g, trail.norms[-1], theta, arguments, state)  # of ε_i; SAM's is (ρ/k)/‖g_i‖
            theta.climb(g, factor)  # θ_{i+1} = θ_i + ε_i
            loss = passes.gradient()  # L(θ_{i+1}), and ∇L(θ_{i+1})
        g = trail.add(loss, *theta.gradients(), last=True)  # g_k

        # Eq. 5 and 6: the arc through v_0, along θ_k − θ_0, and v_1, along g_k.
        searching = arguments.searches and state.search_due
        arc, radius = Arc(lambda: theta.displacement(searching), g, trail.norms[-1]), arguments.radius
        psi = arc.psi if measure else torch.full_like(trail.norms[-1], torch.nan)

        # Eq. 7: α* = argmax L(θ_0 + ρ_max v(α)).
        def loss_at(*terms) -> Tensor:  # L(θ_0 + Σ a x)
            theta.move_to(*terms)
            return passes.loss(theta)

        search = None
        if searching:
            point = arc.points(radius)
            search = search_alpha(lambda a, b: loss_at(*point(a, b)), arc.psi, arguments.alphas, radius)
            state.remember(search, again=trail.leads_nowhere)
        alpha = state.alpha if arguments.alpha is None else arguments.alpha

        # Eq. 8: ‖g_k‖ v(α*) = c (θ_k − θ_0) + d g_k, into p.grad.
        c, d = arc.coefficients(alpha) if arguments.direction == "arc" else trail.sum_into(g)
        arc.combine(*trail.or_fall_back(c, d, arc))
        rescale(arguments.gradient_scale, trail, arc, radius, lambda times: loss_at((g, times)))  # Appendix F
    return XSAMUpdate(trail.losses[0], loss, alpha, psi, trail.norms[0], trail.norms[-1], trail.fell_back, search)


def _plain_update(loss: Tensor, theta: MovableWeights, state: XSAMState) -> XSAMUpdate:
    """An update without an ascent leaves the gradient as it is."""
    size = norm(theta.gradients()[0])
    zero = torch.zeros_like(size)
    return XSAMUpdate(loss, loss, state.alpha, zero, size, size, zero.bool())
