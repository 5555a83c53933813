r"""
How long `rho` should be: a range test, as for a learning rate (Smith 2017, arXiv:1506.01186).

    Δ(ρ) = mean over batches b of L_b(θ + ρ ĝ_b) − L_b(θ),  ĝ_b = g_b/‖g_b‖          how far the loss rises along its gradient
    c(ρ) = Δ(ρ) / (ρ ‖g‖) − 1,  ‖g‖ = mean ‖g_b‖                                      the curvature share

c says how much the loss rises beyond what its slope alone gives; on a quadratic with the Hessian H it is ρ ĝᵀHĝ / (2‖g‖). Where it is
small the ascent has not found any curvature, and where it is large the step has left the surroundings of θ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Trainer

from ..geometry import norm
from ..pass_state import RandomState
from ..passes import Passes
from ..weights import MovableWeights
from .compatibility import check_supported
from .replay import ReplayMixin, follower_of


TAU = 1.0
BAND = 3.0
RHOS = tuple(10 ** (i / 4 - 4) for i in range(21))  # 1e-4 to 10


@dataclass(frozen=True)
class RangeTest:
    """
    What [`find_rho`] found.

    Args:
        rhos (`list[float]`): the grid, in the 2-norm of all perturbed weights.
        rises (`list[float]`): Δ(ρ), in units of the loss; not finite where the loss was not.
        grad_norm (`float`): ‖g‖, 2-norm over all perturbed weights, the mean over the update batches.
        tau (`float`): the curvature share at which `rho` is suggested.
        forward, backward (`int`): how many passes over a micro-batch it took.
    """

    rhos: list[float]
    rises: list[float]
    grad_norm: float
    tau: float
    forward: int
    backward: int

    @property
    def curvature_shares(self) -> list[float]:
        """c(ρ)."""
        return [rise / (rho * self.grad_norm) - 1 for rho, rise in zip(self.rhos, self.rises, strict=True)]

    @property
    def rho(self) -> float | None:
        """The shortest ρ at which c reaches τ, on a straight line over log ρ; `None` if it does so nowhere inside the grid."""
        shares = self.curvature_shares
        for i, (low, high) in enumerate(zip(shares, shares[1:], strict=False)):
            if low < self.tau and not high < self.tau:  # a loss that is not finite lies beyond
                part = (self.tau - low) / (high - low) if math.isfinite(high) else 0.0
                return self.rhos[i] * (self.rhos[i + 1] / self.rhos[i]) ** part
        return None

    @property
    def band(self) -> tuple[float, float] | None:
        """A third of the suggestion to three times as much."""
        return None if self.rho is None else (self.rho / BAND, self.rho * BAND)


def find_rho(
    trainer: Trainer, *, batches: int = 4, rhos: Sequence[float] = RHOS, tau: float = TAU
) -> RangeTest:
    """
    Suggests a `rho` for SAM and XSAM by a range test on update batches of the training data. See docs/choosing_rho.md.

    Every pass is the trainer's own `training_step`. Weights, gradients, buffers and random numbers come back bit for bit. Call it
    before `train`, or after some epochs: at weights that have seen none of the data it tells less.

    Args:
        trainer ([`~transformers.Trainer`]): an [`XSAMTrainer`], or another one with [`XSAMMixin`]. Its `rho` does not matter.
        batches (`int`, *optional*, defaults to 4): update batches, each as large as in training; fewer if there are fewer.
        rhos (`Sequence[float]`, *optional*): the grid in ascending order. By default 21 lengths from 1e-4 to 10.
        tau (`float`, *optional*): the curvature share at which `rho` is suggested; the default was calibrated once.

    Returns:
        [`RangeTest`]: `rho` and `band`, the curve, and the passes that it took.

    Raises:
        `ValueError`: an argument is out of range, the trainer has no XSAM, is training, or measures `rho` in other units (`asam`).
        `NotImplementedError`: several processes, a GradScaler, or what [`XSAMMixin`] refuses in training.
    """
    rhos = list(rhos)
    _check(trainer, batches, rhos)
    # SAM's own ascent from the whole batch, whatever is trained with.
    arguments = replace(trainer.xsam_arguments, rho=rhos[-1], perturbation="sam", ascent_fraction=1.0)
    check_supported(trainer, arguments)
    model, rises, norms, forward, backward = trainer.model, [], [], 0, 0
    with _as_it_was(trainer):
        for samples, n in _updates(trainer, batches):
            theta = MovableWeights(model, arguments, seed=0)
            with theta.gradients_aside():
                micro_batches = [trainer._xsam_first_pass(model, sample, n, arguments, True) for sample in samples]
                passes = Passes(
                    lambda seen=micro_batches: torch.stack([micro_batch.loss for micro_batch in seen]).sum(),
                    lambda seen=micro_batches: trainer._xsam_probe(model, seen),
                    micro_batches[0].before,
                )
                first = passes.first()
                if not all([micro_batch.before.learn() for micro_batch in micro_batches]):
                    raise NotImplementedError(
                        "A forward pass changes something too large to be copied, so that no pass over this batch can be made "
                        "again: freeze it, or keep it out of the model."
                    )
                gradient, _ = theta.gradients()
                size = norm(gradient)

                def rise(rho: float) -> Tensor:
                    theta.move_to((gradient, rho / size))
                    return passes.loss(theta) - first

                with passes.repeated(theta):
                    rises.append(torch.stack([rise(rho) for rho in rhos]))
                norms.append(size)
            forward, backward = forward + len(samples) * (1 + len(rhos)), backward + len(samples)
    means = torch.stack(rises).mean(0).tolist(), torch.stack(norms).mean().item()
    return RangeTest(rhos, *means, tau, forward, backward)


def _check(trainer: Trainer, batches: int, rhos: Sequence[float]) -> None:
    if not isinstance(trainer, ReplayMixin):
        raise ValueError(f"{type(trainer).__name__} has no XSAM: give an XSAMTrainer, or a trainer with XSAMMixin in front.")
    if batches < 1:
        raise ValueError(f"`batches` is {batches}: give 1 or more.")
    if len(rhos) < 2 or not 0 < rhos[0] or not all(low < high < math.inf for low, high in zip(rhos, rhos[1:], strict=False)):
        raise ValueError(f"`rhos` is {rhos}: give two lengths above 0 or more, in ascending order.")
    if trainer.is_in_train:
        raise ValueError("`find_rho` was called inside of a training: call it before or after.")
    if trainer.xsam_arguments.perturbation == "asam":
        raise ValueError("`perturbation` is 'asam', whose `rho` is a share of the weights' size: a range test of lengths says nothing.")
    if trainer.accelerator.num_processes > 1 or trainer.accelerator.scaler is not None:
        raise NotImplementedError("`find_rho` runs in one process and without fp16's GradScaler: test so, with bf16 if need be.")


def _updates(trainer: Trainer, batches: int) -> Iterator[tuple[list, Tensor | int | None]]:
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
def _as_it_was(trainer: Trainer) -> Iterator[None]:
    """Puts back random numbers, modules with their buffers, and what the Trainer and accelerate keep of a pass."""
    names = ("_xsam_follower", "_xsam_generator", "_xsam_micro_batches_seen", "current_gradient_accumulation_steps")
    kept = {name: vars(trainer)[name] for name in names if name in vars(trainer)}
    modes = {module: module.training for module in trainer.model.modules()}
    accelerator = trainer.accelerator
    loaders, drawn_from = list(accelerator._dataloaders), accelerator.gradient_state.dataloader_references
    random = RandomState.capture()
    trainer._xsam_follower = follower_of(trainer)
    before = trainer._xsam_follower.capture()
    try:
        with trainer._xsam_unheard(trainer.model):
            yield
    finally:
        before.restore()
        for name in names:
            if name in kept:
                setattr(trainer, name, kept[name])
            else:
                vars(trainer).pop(name, None)
        for module, mode in modes.items():
            module.training = mode
        accelerator._dataloaders[:], accelerator.gradient_state.dataloader_references = loaders, drawn_from
        random.restore()
