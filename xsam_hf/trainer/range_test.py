r"""
How long `rho` should be: a range test, as for a learning rate (Smith 2017, arXiv:1506.01186).

    Δ(ρ) = mean over batches b of L_b(θ + ρ ĝ_b) − L_b(θ),  ĝ_b = g_b/‖g_b‖          how far the loss rises along its gradient
    c(ρ) = Δ(ρ) / (ρ ‖g‖) − 1,  ‖g‖ = mean ‖g_b‖                                      the curvature share

The suggestion is the ρ at which the loss rises by a quarter of itself. c says how much of the rise is not the slope's; on a quadratic
with the Hessian H it is ρ ĝᵀHĝ / (2‖g‖). docs/choosing_rho.md has the figures that decided for the first and against the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..arguments import XSAMArguments
from ..geometry import norm
from ..pass_state import RandomState
from ..passes import Passes
from ..weights import MovableWeights
from .compatibility import check_supported
from .replay import follower_of
from .trainer import XSAMMixin


RISE = 0.25  # calibrated on three settings, docs/choosing_rho.md
BAND = 3.0
RHOS = tuple(10 ** (i / 4 - 4) for i in range(21))  # 1e-4 to 10


@dataclass(frozen=True)
class RangeTest:
    """
    What [`find_rho`] found.

    Args:
        rhos (`list[float]`): the grid, in the 2-norm of all perturbed weights.
        rises (`list[float]`): Δ(ρ), in units of the loss; not finite where the loss was not.
        loss (`float`): L(θ), the mean over the update batches.
        grad_norm (`float`):
            ‖g‖, 2-norm over all perturbed weights, the mean over the update batches; with `ascent_scope="micro"` the micro-batches'
            norms are added up.
        forward, backward (`int`): how many passes over a micro-batch it took.
    """

    rhos: list[float]
    rises: list[float]
    loss: float
    grad_norm: float
    forward: int
    backward: int

    @property
    def curvature_shares(self) -> list[float]:
        """c(ρ)."""
        return [rise / (rho * self.grad_norm) - 1 for rho, rise in zip(self.rhos, self.rises, strict=True)]

    @property
    def rho(self) -> float | None:
        """The shortest ρ at which the loss rises by a quarter of itself; `None` if it does so nowhere inside the grid."""
        wanted, points = RISE * self.loss, list(zip(self.rhos, self.rises, strict=True))
        for (shorter, low), (longer, high) in pairwise(points):
            if low < wanted and not high < wanted:  # a loss that is not finite lies beyond
                # On a straight line between logarithms: for short steps the rise is proportional to ρ.
                known = 0 < low and math.isfinite(high)
                return shorter * (longer / shorter) ** (math.log(wanted / low) / math.log(high / low) if known else 0)
        return None

    @property
    def band(self) -> tuple[float, float] | None:
        """A third of the suggestion to three times as much."""
        return None if self.rho is None else (self.rho / BAND, self.rho * BAND)


def find_rho(trainer: Trainer, *, batches: int = 4, rhos: Sequence[float] = RHOS) -> RangeTest:
    """
    Suggests a `rho` for SAM and XSAM by a range test on update batches of the training data. See docs/choosing_rho.md.

    Every pass is the trainer's own `training_step`. Weights, gradients, buffers and random numbers come back bit for bit. Call it
    after an epoch of plain training, the `rho` of which is 0: at weights that have seen no data, or have learnt them all, it is wrong.

    Args:
        trainer ([`~transformers.Trainer`]): an [`XSAMTrainer`], or another one with [`XSAMMixin`]. Its `rho` does not matter.
        batches (`int`, *optional*, defaults to 4): update batches, each as large as in training; fewer if there are fewer.
        rhos (`Sequence[float]`, *optional*): the grid in ascending order. By default 21 lengths from 1e-4 to 10.

    Returns:
        [`RangeTest`]: `rho` and `band`, the curve, and the passes that it took.

    Raises:
        `ValueError`: an argument is out of range, the trainer has no XSAM, is training, or measures `rho` in other units (`asam`); the
            loss is not above 0, or it or its gradient is not finite; the data give no batch.
        `NotImplementedError`: several processes, DeepSpeed, a GradScaler, or what [`XSAMMixin`] refuses in training.
    """
    if not isinstance(rhos, Iterable):
        raise ValueError(f"`rhos` is {rhos!r}: give two lengths or more, such as [0.01, 0.1, 1.0].")
    rhos = list(rhos)
    if not isinstance(trainer, XSAMMixin):
        raise ValueError(
            f"{type(trainer).__name__} has no XSAM: give an XSAMTrainer, or a trainer with XSAMMixin in front."
        )
    check(trainer, batches, rhos)
    # SAM's own ascent from the whole batch, whatever is trained with.
    arguments = replace(trainer.xsam_arguments, rho=rhos[-1], perturbation="sam", ascent_fraction=1.0)
    check_supported(trainer, arguments)
    seen, passed = [], 0
    with _as_it_was(trainer):
        if trainer.optimizer is None:  # before a training
            trainer.create_optimizer()
        for samples, n in _updates(trainer, batches):
            alone = arguments.ascent_scope == "micro"  # each micro-batch climbs on its own, and the rises add up
            climbs = [[sample] for sample in samples] if alone else [samples]
            seen.append(torch.stack([_climb(trainer, climb, n, arguments, rhos) for climb in climbs]).sum(0))
            passed += len(samples)
    if not seen:
        raise ValueError(
            "The training data give no update batch: give more examples than one batch takes, or set `dataloader_drop_last` to False."
        )
    loss, size, *rises = torch.stack(seen).mean(0).tolist()
    if not (math.isfinite(loss) and math.isfinite(size)):
        raise ValueError(
            f"The loss at the weights as they stand is {loss} and its gradient's norm {size}: there is no rise to measure. Train anew with a "
            "lower learning rate, or look at the data."
        )
    if loss <= 0:
        raise ValueError(
            f"The loss at the weights as they stand is {loss:g}, and the suggestion is where it rises by {RISE:g} of itself, which needs a "
            "loss above 0: choose `rho` by training with some, as docs/choosing_rho.md does."
        )
    return RangeTest(rhos, rises, loss, size, forward=passed * (1 + len(rhos)), backward=passed)


def _climb(
    trainer: XSAMMixin, samples: list, n: Tensor | int | None, arguments: XSAMArguments, rhos: list[float]
) -> Tensor:
    """Of one update batch: L_b(θ), ‖g_b‖, and L_b(θ + ρ ĝ_b) − L_b(θ) for every ρ."""
    model = cast(nn.Module, trainer.model)
    weights, _ = trainer._xsam_weights()  # those that the optimizer steps, as in training
    theta = MovableWeights(weights, arguments, seed=0)
    every = MovableWeights([*model.parameters(), *weights.values()], XSAMArguments(), seed=0)
    with every.gradients_aside():
        made = [trainer._xsam_first_pass(model, sample, n, arguments, True) for sample in samples]
        passes = Passes(
            lambda: torch.stack([micro_batch.loss for micro_batch in made]).sum(),
            lambda: trainer._xsam_probe(model, made),
            made[0].before,
        )
        loss = passes.first()
        if not all([micro_batch.before.learn() for micro_batch in made]):
            raise NotImplementedError(
                "A forward pass changes something too large to be copied, so that no pass over this batch can be made again: "
                "freeze it, or keep it out of the model."
            )
        gradient, _ = theta.gradients()
        size = norm(gradient)
        found = [loss, size]
        with passes.repeated(theta):
            for rho in rhos:
                theta.move_to((gradient, rho / size))
                found.append(passes.loss(theta) - loss)
    return torch.stack(found)


def check(trainer: XSAMMixin, batches: int, rhos: Sequence[float]) -> None:
    """
    What can be told before the first pass.

    Raises:
        `ValueError`, `NotImplementedError`: see [`find_rho`].
    """
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"`batches` is {batches}: give a whole number, 1 or more.")
    if not all(isinstance(rho, int | float) for rho in rhos):
        raise ValueError(f"`rhos` is {rhos}: give numbers.")
    if len(rhos) < 2 or not 0 < rhos[0] or not all(low < high < math.inf for low, high in pairwise(rhos)):
        raise ValueError(f"`rhos` is {rhos}: give two lengths above 0 or more, in ascending order.")
    if trainer.is_in_train:
        raise ValueError("`find_rho` was called inside of a training: call it before or after.")
    if trainer.xsam_arguments.perturbation == "asam":
        raise ValueError(
            "`perturbation` is 'asam', whose `rho` is a share of the weights' size: a range test of lengths says nothing."
        )
    if trainer.accelerator.num_processes > 1 or trainer.accelerator.scaler is not None or trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "`find_rho` runs in one process, without DeepSpeed and without fp16's GradScaler: test so, with bf16 if need be."
        )


def _updates(trainer: XSAMMixin, batches: int) -> Iterator[tuple[list, Tensor | int | None]]:
    """The micro-batches of some updates and their number of items, as the Trainer draws them."""
    steps = trainer.args.gradient_accumulation_steps
    drawn = iter(trainer.get_train_dataloader())
    for _ in range(batches):
        samples, n = trainer.get_batch_samples(drawn, steps, trainer.args.device)
        if not samples:
            return
        trainer.current_gradient_accumulation_steps = len(samples)
        yield samples, n


@contextmanager
def _as_it_was(trainer: XSAMMixin) -> Iterator[None]:
    """Puts back random numbers, modules with their buffers, and what the Trainer and accelerate keep of a pass."""
    names = (
        "_xsam_follower",
        "_xsam_generator",
        "_xsam_micro_batches_seen",
        "_xsam_named",
        "_xsam_optimizer",
        "current_gradient_accumulation_steps",
        "optimizer",
    )
    kept = {name: vars(trainer)[name] for name in names if name in vars(trainer)}
    model = cast(nn.Module, trainer.model)
    accelerator = trainer.accelerator
    loaders, drawn_from = list(accelerator._dataloaders), accelerator.gradient_state.dataloader_references
    random = RandomState.capture()
    trainer._xsam_follower = follower_of(trainer)
    before = trainer._xsam_follower.capture()
    try:
        with trainer._xsam_unheard(model):
            yield
    finally:
        before.restore()
        for name in names:
            if name in kept:
                setattr(trainer, name, kept[name])
            else:
                vars(trainer).pop(name, None)
        accelerator._dataloaders[:], accelerator.gradient_state.dataloader_references = loaders, drawn_from
        random.restore()
