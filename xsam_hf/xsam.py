r"""
XSAM, the algorithm ("Revisiting Sharpness-Aware Minimization: A More Faithful and Effective Implementation", ICLR 2026).

    min_θ max_{‖δ‖≤ρ} L(θ+δ)                                     the objective                                 Eq. 1
    θ_0 = θ,  g_i = ∇L(θ_i),  θ_{i+1} = θ_i + (ρ/k) g_i/‖g_i‖    k ascent steps                                §2.1
    v_0 = (θ_k−θ_0)/‖θ_k−θ_0‖,  v_1 = g_k/‖g_k‖                  the two spanning vectors                      Eq. 5
    v(α) = [sin((1−α)ψ) v_0 + sin(αψ) v_1] / sin ψ               the arc between and beyond them               Eq. 6
    α* = argmax L(θ_0 + ρ_max v(α))                              forward passes on a grid, now and then        Eq. 7
    θ ← θ − η ‖g_k‖ v(α*)                                        the base optimizer's step                     Eq. 8

L is the training loss on one update batch, ‖·‖ the 2-norm over all trainable weights. Only torch is needed here: the two
callables `gradient` and `probe` are all that this file knows of a training framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .ascent import asam, fsam, sam, vasso
from .direction import arc, scale, share
from .geometry import angle, local, norm, zero_unless
from .hyperparameters import XSAMArguments
from .perturbation import (
    RandomState,
    buffers_kept,
    drop_gradient,
    interrupts_held,
    park,
    perturbed_and_excluded,
    take_gradient,
    weights_kept,
)
from .reuse import turn, turn_of
from .rounding import add_rounded, climb, half_precision, kept_share
from .schedule import search_at, sharp_at
from .search import search_alpha
from .state import XSAMState, XSAMUpdate


def xsam_gradient(
    weights: nn.Module | Iterable[Tensor],
    gradient: Callable[[], Tensor],
    probe: Callable[[], Tensor],
    arguments: XSAMArguments,
    state: XSAMState,
    *,
    loss_scaling: bool = False,
) -> XSAMUpdate:
    r"""
    Puts XSAM's direction $\|g_k\|\,v(\alpha)$ (Eq. 8) into `p.grad`, for the base optimizer to step against.

    The weights come back bit for bit, also when a pass raises, and the random-number streams stand where the first pass
    left them. No host synchronisation outside a search, one extra parameter-sized buffer outside a search, two during one;
    a sum of gradients (`lsam` ...), a running average and `sharpness_between="reuse"` take one more each.

    Args:
        weights (`torch.nn.Module` or iterable of `torch.Tensor`):
            The model, or the weights to perturb. With a model, its running statistics move in the first pass only.
            Weights that do not require a gradient are left alone. Those in `rho_exclude` (which needs a model, for the names)
            are not moved, count in no norm, and get g_k as it is.
        gradient (`Callable`):
            Adds the update batch's gradient at the current weights to `p.grad` and returns the loss, a 0-dim tensor. Called
            `ascent_steps + 1` times with the same random numbers; once if XSAM is off in this update. With several
            processes every one calls it equally often and sees the same, reduced, gradient.
        probe (`Callable`):
            Returns the same loss, in train mode, without a gradient, and averaged over processes.
        arguments ([`XSAMArguments`]): the method's hyperparameters.
        state ([`XSAMState`]): updated in place; keep it with your checkpoint.
        loss_scaling (`bool`, *optional*, defaults to `False`):
            A `GradScaler` scales the loss: a non-finite gradient of any pass is left in `p.grad` for it to see and skip.
            Without one, a later pass that is not finite falls back to the ascent's direction with norm ‖g_0‖, which for
            `sam` and `ascent_steps=1` is g_0; a first pass that is not finite is left as it is, as in plain training.

    Returns:
        [`XSAMUpdate`]: the loss L(θ_0) and what the update saw. With `rho=0` nothing is done but call `gradient` once.

    Raises:
        `ValueError`: no weight requires or received a gradient, `rho_exclude` leaves none or has no names to look at, or a
            schedule is a share of a whole that is not known here.
        `NotImplementedError`: a gradient is sparse.
    """
    module = weights if isinstance(weights, nn.Module) else None
    weights, excluded = perturbed_and_excluded(weights, arguments.rho_exclude)
    sharp = arguments.rho > 0 and sharp_at(arguments, state.updates)
    searching = arguments.direction == "arc" and arguments.alpha is None
    state.search_due |= searching and search_at(arguments, state.updates)
    before = RandomState.capture()
    losses = [gradient()]  # L(θ_0), and g_0 = ∇L(θ_0)
    after = RandomState.capture()
    state.updates += 1
    if not sharp:
        return _plain_update(weights, losses[0], arguments, state)

    def replay(one_pass: Callable[[], Tensor]) -> Tensor:
        before.restore()
        torch.clear_autocast_cache()  # an enclosing autocast region keeps casts of weights that have moved since
        return stoppable(one_pass)

    try:
        with interrupts_held() as stoppable, torch.no_grad(), weights_kept(weights) as origin, buffers_kept(module):
            moved: dict[Tensor, None] = {}  # an ordered set: every weight that had a gradient in some pass
            norms: list[Tensor] = []  # ‖g_0‖ ... ‖g_k‖
            sums: dict[Tensor, Tensor] = {}  # for LSAM and MSAM
            finite = torch.ones((), dtype=torch.bool, device=weights[0].device)  # every later pass so far
            start = dict(zip(weights, origin, strict=True))
            exact: dict[Tensor, Tensor] = {}  # for `perturbation_dtype="float32"`: θ_i − θ_0
            # Seeded by the update, for rounding at random: the same on all processes, and no random stream moves.
            generator = torch.Generator(weights[0].device).manual_seed(state.updates)
            for i in range(arguments.ascent_steps + 1):
                g = take_gradient(weights, moved)
                norms.append(norm(g))
                if i > 0:
                    others = [weight.grad for weight in excluded if weight.grad is not None]
                    finite = finite & torch.isfinite(norms[i] + norm(others) if others else norms[i])
                    if not loss_scaling:
                        zero_unless(finite, others if i == arguments.ascent_steps else [*g, *others])
                _add_to_sums(sums, moved, g, share(arguments.direction, i, norms[i]))
                if i == arguments.ascent_steps:
                    break
                _step(g, norms[i], list(moved), weights, arguments, state)  # ε_i; for SAM (ρ/k) g_i/‖g_i‖
                climb(list(moved), g, arguments.perturbation_dtype, exact, start, generator)  # θ_{i+1} = θ_i + ε_i
                if state.perturbation_kept is None and half_precision(weights):
                    state.perturbation_kept = float(kept_share(g, list(moved), start))
                g.clear()
                drop_gradient([*weights, *excluded])
                with torch.enable_grad():
                    losses.append(replay(gradient))  # g_{i+1} = ∇L(θ_{i+1})

            del start  # so that `park` can free the tensors in it
            # From here on the weights' own storage holds the displacement θ_k − θ_0: no further buffer.
            torch._foreach_sub_(local(weights), origin)
            displacement = [exact.get(weight, weight) for weight in moved]
            displacement_norm = norm(displacement)
            psi = angle(displacement, g, displacement_norm, norms[-1])
            displacement = local(displacement)
            radius = 2 * arguments.rho if arguments.rho_max is None else arguments.rho_max

            def loss_at(*terms: tuple[Sequence[Tensor], float | Tensor]) -> Tensor:  # L(θ_0 + Σ a x)
                torch._foreach_copy_(local(weights), origin)
                # Equal rounding at every α (see `RandomState`), but not the ascent's, which is in v_0 and would add to itself.
                generator.manual_seed(2**31 + state.updates)
                add_rounded(list(moved), terms, generator if arguments.perturbation_dtype == "stochastic" else None)
                return replay(probe)

            search = None
            if searching and state.search_due:
                if arguments.search_offload:
                    park(origin)
                if not exact:
                    displacement = [part.clone() for part in displacement]
                along, across = float(radius / displacement_norm), float(radius / norms[-1])
                search = search_alpha(  # of L(θ_0 + ρ_max (a v_0 + b v_1))
                    lambda a, b: loss_at((displacement, along * a), (local(g), across * b)),
                    psi, arguments.alphas, radius, arguments.alpha_search, arguments.alpha_smoothing,
                )  # fmt: skip
                state.remember(search)

            alpha = state.alpha if arguments.alpha is None else arguments.alpha
            if arguments.direction == "arc":
                c, d = arc(alpha, psi, displacement_norm, norms[-1])
                if arguments.sharpness_between == "reuse":
                    kept = dict(zip(moved, turn_of(g, displacement, displacement_norm), strict=True))
                    state.tensors["sideways"] = [kept.get(w, torch.zeros_like(w)) for w in weights]
                    zero_unless(finite, state.tensors["sideways"])  # no turn is better than one that is not finite
                    ratio = norms[-1] / norms[0]
                    state.tensors["turn"] = [
                        torch.where(finite, alpha * psi, 0.0),
                        torch.where(finite & (norms[0] > 0), ratio, 1.0),
                    ]
            else:
                torch._foreach_copy_(local(g), [sums[weight] for weight in moved])
                size = norm(g)
                c, d = torch.zeros_like(size), torch.where(size > 0, norms[-1] / size, torch.zeros_like(size))
            if not loss_scaling:
                for part in local(g):
                    part.nan_to_num_(0.0, 0.0, 0.0)  # 0 · NaN would stay NaN; half the time of `zero_unless`
                c, d = (
                    torch.where(finite, c, norms[0] / displacement_norm),
                    torch.where(finite, d, torch.zeros_like(d)),
                )
            torch._foreach_mul_(displacement, torch.where(displacement_norm > 0, c, torch.zeros_like(c)))
            torch._foreach_mul_(local(g), d)
            torch._foreach_add_(local(g), displacement)  # ‖g_k‖ v(α)

            if arguments.gradient_scale != "last":
                loss: Tensor = losses[-1]
                length: Tensor | float = displacement_norm
                if arguments.gradient_scale == "slope_max":
                    loss, length = loss_at((local(g), radius / norm(g).clamp_min(1e-30))), radius
                wanted = scale(arguments.gradient_scale, norms, losses[0], loss, length)
                ratio = torch.where(norms[-1] > 0, wanted / norms[-1], torch.zeros_like(wanted))
                ratio = torch.where(finite, ratio, torch.ones_like(ratio))
                torch._foreach_mul_(local(g), ratio)
                if arguments.sharpness_between == "reuse":
                    state.tensors["turn"][1] *= ratio
    except BaseException:
        drop_gradient([*weights, *excluded])
        raise
    finally:
        after.restore()
        torch.clear_autocast_cache()
    fell_back = torch.isfinite(norms[0]) & ~finite & (not loss_scaling)
    return XSAMUpdate(losses[0], losses[-1], alpha, psi, norms[0], norms[-1], fell_back, search)


def _step(
    g: list[Tensor],
    size: Tensor,
    moved: list[Tensor],
    weights: list[Tensor],
    arguments: XSAMArguments,
    state: XSAMState,
) -> None:
    """Turns the gradients of the weights in `moved` into the ascent step ε, in place."""
    length = arguments.rho / arguments.ascent_steps
    if arguments.perturbation == "sam":
        sam(g, size, length)
    elif arguments.perturbation == "asam":
        asam(g, moved, length, arguments.asam_eta, arguments.asam_scope)
    elif "average" not in state.tensors:  # the average starts as the first gradient
        first = dict(zip(moved, g, strict=True))
        state.tensors["average"] = average = [first[w].clone() if w in first else torch.zeros_like(w) for w in weights]
        zero_unless(torch.isfinite(size), average)
        sam(g, size, length)
    else:
        all_averages = dict(zip(weights, state.tensors["average"], strict=True))
        average = [all_averages[weight] for weight in moved]
        if arguments.perturbation == "vasso":
            vasso(g, size, average, length, arguments.vasso_decay)
        else:
            fsam(g, size, average, length, arguments.fsam_sigma, arguments.fsam_lambda)


def _add_to_sums(
    sums: dict[Tensor, Tensor], moved: Iterable[Tensor], g: Sequence[Tensor], factor: Tensor | None
) -> None:
    if factor is not None:
        for weight, part in zip(moved, local(g), strict=True):
            sums[weight] = sums[weight].add_(part * factor) if weight in sums else part * factor


def _plain_update(weights: list[Tensor], loss: Tensor, arguments: XSAMArguments, state: XSAMState) -> XSAMUpdate:
    """An update without an ascent: the gradient as it is, or turned as the last XSAM update was."""
    moved: dict[Tensor, None] = {}
    g = take_gradient(weights, moved)
    size = norm(g)
    if arguments.sharpness_between == "reuse" and "turn" in state.tensors:
        sideways = dict(zip(weights, state.tensors["sideways"], strict=True))
        with torch.no_grad():
            turn(g, [sideways[weight] for weight in moved], *state.tensors["turn"])
    return XSAMUpdate(loss, loss, state.alpha, torch.zeros_like(size), size, size, size.isnan())
