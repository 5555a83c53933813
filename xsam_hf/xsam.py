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

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .ascent import ASCENTS
from .direction import DIRECTIONS
from .geometry import angle, local, norm, zero_unless
from .perturbation import RandomState, batch_norm_kept, drop_gradient, take_gradient, weights_kept
from .search import AlphaSearch, search_alpha


@dataclass
class XSAMArguments:
    """
    The method's hyperparameters, each of them also a field of [`XSAMTrainingArguments`] and a command-line flag.

    Args:
        rho (`float`, *optional*, defaults to 0.05):
            Total ascent length, in the 2-norm of all trainable weights; each of the k steps is `rho / ascent_steps` long.
            0 switches everything off: the plain optimizer, one pass. Denoted ρ in the paper.
        ascent_steps (`int`, *optional*, defaults to 1):
            Number of ascent steps. An update costs `ascent_steps + 1` passes. Denoted k in the paper.
        perturbation (`str`, *optional*, defaults to `"sam"`):
            Where to climb.
        direction (`str`, *optional*, defaults to `"arc"`):
            Where to descend.
        alpha (`float`, *optional*):
            Position on the arc. Not given: searched (XSAM). 1: SAM. Another fixed value: WSAM-like. Denoted α.
        rho_max (`float`, *optional*, defaults to `2 * rho`):
            Radius of the search for α, in the same norm as `rho`. Denoted ρ_max.
        alpha_max (`float`, *optional*, defaults to 2.0):
            End of the search's grid, which starts at 0.
        alpha_samples (`int`, *optional*, defaults to 21):
            Points of the grid, both ends included. One forward pass each.
        alpha_search_steps (`float`, *optional*):
            How often α is searched. Not given: at the first update of every epoch. A whole number: every so many updates.
            Below 1: that share of all updates, as for `eval_steps`.
        ascent_scope (`str`, *optional*, defaults to `"update"`):
            `"update"`: one ascent for the whole update batch, over micro-batches and processes. `"micro"`: each
            micro-batch of each process climbs on its own (m-sharpness).

    Raises:
        `ValueError`: a value is out of range or unknown; the message names the field, the value and the way out.
    """

    rho: float = field(
        default=0.05,
        metadata={"help": "Total ascent length in the 2-norm of all trainable weights. 0: plain optimizer, one pass."},
    )
    ascent_steps: int = field(default=1, metadata={"help": "Number k of ascent steps, each rho / k long."})
    perturbation: str = field(default="sam", metadata={"help": f"Where to climb: {', '.join(ASCENTS)}."})
    direction: str = field(default="arc", metadata={"help": f"Where to descend: {', '.join(DIRECTIONS)}."})
    alpha: float | None = field(
        default=None, metadata={"help": "Position on the arc. Not given: searched (XSAM). 1: SAM. Other: WSAM-like."}
    )
    rho_max: float | None = field(default=None, metadata={"help": "Radius of the search for alpha. Default: 2 * rho."})
    alpha_max: float = field(default=2.0, metadata={"help": "End of the grid of the search, which starts at 0."})
    alpha_samples: int = field(default=21, metadata={"help": "Points of the grid, both ends included."})
    alpha_search_steps: float | None = field(
        default=None,
        metadata={
            "help": "How often alpha is searched. Not given: first update of every epoch. n: every n updates. "
            "Below 1: share of training."
        },
    )
    ascent_scope: str = field(
        default="update",
        metadata={"help": "update: one ascent for the whole update batch. micro: each micro-batch its own."},
    )

    def __post_init__(self):
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"`rho` is {self.rho}: give a finite length, 0.05 for instance, or 0 to switch XSAM off.")
        if self.ascent_steps < 1 or self.ascent_steps != int(self.ascent_steps):
            raise ValueError(f"`ascent_steps` is {self.ascent_steps}: give 1 or more; for none at all set `rho` to 0.")
        for name, known in (
            ("perturbation", ASCENTS),
            ("direction", DIRECTIONS),
            ("ascent_scope", ("update", "micro")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if self.rho_max is not None and not (math.isfinite(self.rho_max) and self.rho_max > 0):
            raise ValueError(f"`rho_max` is {self.rho_max}: give a length above 0, or leave it out for 2 * rho.")
        if not (math.isfinite(self.alpha_max) and self.alpha_max > 0):
            raise ValueError(f"`alpha_max` is {self.alpha_max}: give an end of the grid above 0 (the paper's is 2).")
        if self.alpha_samples < 2 or self.alpha_samples != int(self.alpha_samples):
            raise ValueError(
                f"`alpha_samples` is {self.alpha_samples}: give 2 points or more (the paper's grid is 21)."
            )
        if self.alpha is not None and not 0 <= self.alpha <= self.alpha_max:
            raise ValueError(
                f"`alpha` is {self.alpha}: give a value from 0 to `alpha_max` ({self.alpha_max}), or leave it out to search."
            )
        steps = self.alpha_search_steps
        if steps is not None and not (0 < steps < 1 or (steps >= 1 and steps == int(steps))):
            raise ValueError(
                f"`alpha_search_steps` is {steps}: give a whole number of updates, a share of training between 0 and 1, "
                "or leave it out to search at the first update of every epoch."
            )
        # `class X(XSAMArguments, TrainingArguments)` is one cooperative chain.
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    @property
    def alphas(self) -> list[float]:
        """The grid of the search: `alpha_samples` points from 0 to `alpha_max`, both included."""
        return [self.alpha_max * i / (self.alpha_samples - 1) for i in range(self.alpha_samples)]

    @classmethod
    def of(cls, arguments: Any) -> XSAMArguments:
        """The method's fields of any arguments object, checked anew; the defaults for those that it does not have."""
        values: dict[str, Any] = {f.name: getattr(arguments, f.name, f.default) for f in fields(XSAMArguments)}
        return cls(**values)


@dataclass
class XSAMState:
    """
    What XSAM remembers between updates; all of it is plain numbers, so that it fits into any checkpoint.

    Args:
        alpha (`float`): position on the arc that was last found; starts at 1, SAM's direction.
        search_due (`bool`): search α in the next update; set it at the beginning of every epoch.
        updates (`int`): updates made so far.
        search_gain (`float`, *optional*): L(θ_0 + ρ_max v(α*)) − L(θ_0 + ρ_max v(1)) of the last search.
        alpha_at_edge (`bool`, *optional*): whether the last search ended at an end of its grid.
    """

    alpha: float = 1.0
    search_due: bool = True
    updates: int = 0
    search_gain: float | None = None
    alpha_at_edge: bool | None = None

    def remember(self, search: AlphaSearch) -> None:
        """Takes over the result of a search. One without a finite loss changes nothing: α is kept."""
        self.search_due = False
        if search.alpha is not None:
            self.alpha, self.search_gain, self.alpha_at_edge = search.alpha, search.gain, search.at_edge


@dataclass
class XSAMUpdate:
    """
    What one update saw. Numbers are 0-dim tensors on the weights' device, so that reading them is the caller's choice.

    Args:
        loss (`torch.Tensor`): L(θ_0), the loss to report.
        last_loss (`torch.Tensor`): L(θ_k); `last_loss - loss` is the sharpness.
        alpha (`float`): α of this update.
        angle (`torch.Tensor`): ψ between the displacement and g_k, in radians.
        grad_norm_first (`torch.Tensor`): ‖g_0‖, the 2-norm over all trainable weights.
        grad_norm_last (`torch.Tensor`): ‖g_k‖.
        fell_back (`torch.Tensor`): whether g_0's direction had to stand in for a non-finite g_k (boolean).
        search (`AlphaSearch`, *optional*): the search, if there was one.
    """

    loss: Tensor
    last_loss: Tensor
    alpha: float
    angle: Tensor
    grad_norm_first: Tensor
    grad_norm_last: Tensor
    fell_back: Tensor
    search: AlphaSearch | None = None


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
    left them. No host synchronisation outside a search, one extra parameter-sized buffer outside a search, two during one.

    Args:
        weights (`torch.nn.Module` or iterable of `torch.Tensor`):
            The model, or the weights to perturb. With a model, its BatchNorm statistics move in the first pass only.
            Weights that do not require a gradient are left alone.
        gradient (`Callable`):
            Adds the update batch's gradient at the current weights to `p.grad` and returns the loss, a 0-dim tensor. Called
            `ascent_steps + 1` times with the same random numbers. With several processes every one calls it equally often
            and sees the same, reduced, gradient.
        probe (`Callable`):
            Returns the same loss, in train mode, without a gradient, and averaged over processes.
        arguments ([`XSAMArguments`]): the method's hyperparameters.
        state ([`XSAMState`]): updated in place; keep it with your checkpoint.
        loss_scaling (`bool`, *optional*, defaults to `False`):
            A `GradScaler` scales the loss: a non-finite gradient of any pass is left in `p.grad` for it to see and skip.
            Without one, a later pass that is not finite falls back to the ascent's direction with norm ‖g_0‖, which for
            `ascent_steps=1` is g_0; a first pass that is not finite is left as it is, as in plain training.

    Returns:
        [`XSAMUpdate`]: the loss L(θ_0) and what the update saw. With `rho=0` nothing is done but call `gradient` once.

    Raises:
        `ValueError`: no weight requires or received a gradient, or `alpha_search_steps` is a share of an unknown whole.
        `NotImplementedError`: a gradient is sparse.
    """
    module = weights if isinstance(weights, nn.Module) else None
    parameters = weights.parameters() if isinstance(weights, nn.Module) else weights
    weights = [weight for weight in parameters if weight.requires_grad]
    if not weights:
        raise ValueError("No weight requires a gradient: there is nothing to perturb. Unfreeze some of the model.")
    search_due = _search_due(arguments, state)
    before = RandomState.capture()
    first_loss = gradient()  # g_0 = ∇L(θ_0)
    after = RandomState.capture()
    if arguments.rho == 0:
        size = norm(take_gradient(weights, {}))
        return XSAMUpdate(first_loss, first_loss, state.alpha, torch.zeros_like(size), size, size, size.isnan())

    def replay(one_pass: Callable[[], Tensor]) -> Tensor:
        before.restore()
        return one_pass()

    try:
        with torch.no_grad(), weights_kept(weights) as origin, batch_norm_kept(module):
            moved: dict[Tensor, None] = {}  # an ordered set: every weight that had a gradient in some pass
            norms: list[Tensor] = []
            finite = torch.ones((), dtype=torch.bool, device=weights[0].device)  # every later pass so far
            for _ in range(arguments.ascent_steps):
                step = take_gradient(weights, moved)
                if norms and not loss_scaling:
                    finite = finite & torch.isfinite(norm(step))
                    zero_unless(finite, step)
                norms.append(ASCENTS[arguments.perturbation](step, arguments.rho / arguments.ascent_steps))
                torch._foreach_add_(local(list(moved)), local(step))  # θ_{i+1} = θ_i + (ρ/k) g_i/‖g_i‖
                del step
                drop_gradient(weights)
                with torch.enable_grad():
                    last_loss = replay(gradient)  # g_{i+1} = ∇L(θ_{i+1})

            # From here on the weights' own storage holds the displacement θ_k − θ_0: no further buffer.
            g = take_gradient(weights, moved)
            torch._foreach_sub_(local(weights), origin)
            displacement = local(list(moved))
            displacement_norm, last_norm, psi = norm(list(moved)), norm(g), angle(list(moved), g)

            search = None
            if search_due:
                displacement = [part.clone() for part in displacement]
                radius = 2 * arguments.rho if arguments.rho_max is None else arguments.rho_max
                along, across = float(radius / displacement_norm), float(radius / last_norm)

                def loss_at(a: float, b: float) -> Tensor:  # L(θ_0 + ρ_max (a v_0 + b v_1))
                    torch._foreach_copy_(local(weights), origin)
                    torch._foreach_add_(local(list(moved)), displacement, alpha=along * a)
                    torch._foreach_add_(local(list(moved)), local(g), alpha=across * b)
                    return replay(probe)

                search = search_alpha(loss_at, psi, arguments.alphas, radius)
                state.remember(search)

            alpha = state.alpha if arguments.alpha is None else arguments.alpha
            c, d = DIRECTIONS[arguments.direction](alpha, psi, displacement_norm, last_norm)
            finite = finite & torch.isfinite(last_norm)
            if not loss_scaling:
                zero_unless(finite, g)
                c, d = torch.where(finite, c, norms[0] / displacement_norm), torch.where(finite, d, torch.ones_like(d))
            torch._foreach_mul_(displacement, torch.where(displacement_norm > 0, c, torch.zeros_like(c)))
            torch._foreach_mul_(local(g), d)
            torch._foreach_add_(local(g), displacement)  # ‖g_k‖ v(α)
    except BaseException:
        drop_gradient(weights)
        raise
    finally:
        after.restore()
    state.updates += 1
    fell_back = torch.isfinite(norms[0]) & ~finite & (not loss_scaling)
    return XSAMUpdate(first_loss, last_loss, alpha, psi, norms[0], last_norm, fell_back, search)


def _search_due(arguments: XSAMArguments, state: XSAMState) -> bool:
    every = arguments.alpha_search_steps
    if arguments.alpha is not None:
        return False
    if every is not None and every < 1:
        raise ValueError(
            f"`alpha_search_steps` is {every}, a share of training, but the number of updates is not known here: "
            "give a whole number of updates, or use XSAMTrainer."
        )
    return state.search_due or (every is not None and state.updates % every == 0)
