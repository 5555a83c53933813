"""The loss of a model on fixed batches as a function of its trained weights, and the guarantee that looking at it changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..arguments import XSAMArguments
from ..arithmetic import clone
from ..held_modules import parts_of
from ..module_state import StateFollower
from ..pass_state import PassState
from ..passes import Passes
from ..trainable import perturbed_and_excluded
from ..trainer.micro_batch import copy_of
from ..weights import MovableWeights
from .checked import check_count


class Surface:
    """
    L(θ): the mean loss over some batches, each weighted by its number of examples, as a function of the trained weights.

    Every pass starts from the same random numbers and buffers. When a measurement ends, in whatever way, weights, gradients,
    buffers, modes and random numbers are what they were, bit for bit.

    Args:
        model ([`~transformers.Trainer`] or `torch.nn.Module`):
            With a trainer the loss is its `compute_loss`, mixed precision included; with a model it is `model(**batch).loss`.
        batches (sequence of mappings):
            What the model is called with; [`batches_of`] takes a trainer's first ones.
        training (`bool`, *optional*, defaults to `False`):
            Whether dropout and BatchNorm work as in training, where XSAM searches, or as in evaluation.

    Raises:
        `TypeError`: the batches are no sequence of mappings.
        `ValueError`: there is no batch, or no weight is trained.
        `NotImplementedError`: the trainer runs in several processes, or scales its loss.
    """

    def __init__(self, model: Trainer | nn.Module, batches: Sequence[Mapping[str, Any]], training: bool = False):
        self.trainer = model if isinstance(model, Trainer) else None
        self.model: nn.Module = self.trainer.model if self.trainer is not None else model  # type: ignore[assignment]
        self.batches: list[dict[str, Any]] = []
        self.training = training
        if isinstance(batches, Mapping):
            _refuse_batches(f"is a {type(batches).__name__}")
        for batch in batches:
            if not isinstance(batch, Mapping):
                _refuse_batches(f"has a {type(batch).__name__}")
            self.batches.append(copy_of(dict(batch)))
        if not self.batches:
            raise ValueError("There is no batch to measure the loss on: give at least one.")
        loss = None
        if self.trainer is not None:
            _check_supported(self.trainer)
            loss = self.trainer.compute_loss_func
        self.weights, _ = perturbed_and_excluded(self.model, None)
        self.forwards = self.backwards = 0  # passes over all of the batches so far
        parts = [part for part in (loss, *parts_of(loss)) if isinstance(part, nn.Module)]
        self._follower = StateFollower([self.model, *parts], (), self.weights.values)
        sizes = [_examples(batch) for batch in self.batches]
        self._shares = [size / sum(sizes) for size in sizes]
        self._before: PassState | None = None

    @contextmanager
    def kept(self) -> Iterator[PassState]:
        """The block in which passes run. At its end all is as it was; yields what each pass starts from."""
        modes = [(module, module.training) for module in self.model.modules()]
        gradients = [(weight, weight.grad) for weight in self.model.parameters()]
        unheard = getattr(self.trainer, "_xsam_unheard", None)  # what `compute_loss` logs and counts stays out
        self.model.train(self.training)  # which each pass starts from
        try:
            self._before = before = PassState.capture(self._follower, by_content=True)
            try:
                for weight, _ in gradients:
                    weight.grad = None
                with nullcontext() if unheard is None else unheard(self.model):
                    yield before
            finally:
                before.learn()
                before.restore()
                for weight, gradient in gradients:
                    weight.grad = gradient
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def moving(self) -> Iterator[Moving]:
        """
        The block in which the weights move from θ_0, where they stand.

        Raises:
            `ValueError`: L(θ_0) is not finite, or no weight receives a gradient.
            `NotImplementedError`: a pass changes what cannot be put back for the others.
        """
        theta = MovableWeights(self.weights, XSAMArguments(), seed=0)
        with self.kept() as before:
            passes = Passes(self.gradient, self.probe, before)
            loss = float(passes.first())
            if not math.isfinite(loss):
                raise ValueError(f"The loss at the weights as they stand is {loss}: there is no surface to look at.")
            if not passes.repeatable:
                raise NotImplementedError(
                    "A pass writes into a buffer or a frozen weight that is too large to be copied, so that no two passes are alike: "
                    "measure on a model without it."
                )
            gradient = clone(theta.gradients()[0])
            theta.drop_gradients()
            with passes.repeated(theta):
                yield Moving(theta, passes, loss, gradient)

    def gradient(self) -> Tensor:
        """Adds ∇L at the weights as they stand to `p.grad` and returns the loss, 0-dim: what `xsam_gradient` asks for."""
        self.backwards += 1
        total = []
        for i in range(len(self.batches)):
            loss = self.batch_loss(i)
            loss.backward()
            total.append(loss.detach())
        return torch.stack(total).sum()

    def probe(self) -> Tensor:
        """The same loss without a gradient."""
        self.forwards += 1
        return torch.stack([self.batch_loss(i) for i in range(len(self.batches))]).sum()

    def batch_loss(self, i: int) -> Tensor:
        """The part of batch i in the loss; only inside of [`kept`]."""
        assert self._before is not None
        self._before.restore()
        batch = copy_of(self.batches[i])
        if self.trainer is None:
            loss: Any = _loss_in(self.model(**{name: _to(value, self.weights) for name, value in batch.items()}))
        else:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, self.trainer._prepare_inputs(batch))
        return loss.mean() * self._shares[i]


class Moving:
    """
    A surface whose weights move; vectors are lists of tensors, one for each weight that receives a gradient.

    Attributes:
        loss (`float`): L(θ_0).
        gradient (`list[torch.Tensor]`): g_0 = ∇L(θ_0).
    """

    def __init__(self, theta: MovableWeights, passes: Passes, loss: float, gradient: list[Tensor]):
        self._theta, self._passes, self.loss, self.gradient = theta, passes, loss, gradient

    @property
    def weights(self) -> list[Tensor]:
        """θ, as it stands."""
        return self._theta.weights

    @property
    def names(self) -> list[str]:
        return self._theta.names

    @torch.no_grad()
    def loss_at(self, *terms: tuple[Sequence[Tensor], float]) -> float:
        """L(θ_0 + Σ a x); NaN or infinite where it is."""
        self._theta.move_to(*terms)
        return float(self._passes.loss(self._theta))

    @torch.no_grad()
    def gradient_at(self, *terms: tuple[Sequence[Tensor], float]) -> tuple[float, list[Tensor]]:
        """L(θ_0 + Σ a x) and the gradient there."""
        self._theta.move_to(*terms)
        loss = float(self._passes.gradient())
        gradient = clone(self._theta.gradients()[0])[: len(self.gradient)]
        self._theta.drop_gradients()
        return loss, gradient

    @torch.no_grad()
    def back(self) -> None:
        """θ_0, while the block goes on."""
        self._theta.move_to()


def _refuse_batches(found: str) -> NoReturn:
    raise TypeError(f"`batches` {found}: give a list of dictionaries, with all that the model is called with.")


def check_surface(surface: Surface) -> None:
    """
    Raises:
        `TypeError`: it is none.
    """
    if not isinstance(surface, Surface):
        raise TypeError(f"`surface` is a {type(surface).__name__}: give Surface(model, batches).")


def batches_of(trainer: Trainer, count: int) -> list[Any]:
    """
    A trainer's first training batches, as its data loader gives them; the random numbers stay where they are.

    Accelerate's wrapper is left out: a loader of it that is not read to its end takes the place of the one that training reads.

    Raises:
        `ValueError`: `count` is no whole number from 1 on, or there are fewer.
    """
    check_count("count", count)
    with _random_numbers_kept():
        loader = trainer.get_train_dataloader()
        found = list(islice(getattr(loader, "base_dataloader", loader), count))
    if len(found) < count:
        raise ValueError(f"The trainer's data have {len(found)} batches, and {count} are asked for.")
    return found


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """⟨x, y⟩ over all elements of all tensors, in float64."""
    return sum(float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double())) for a, b in zip(x, y, strict=True))


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    before = PassState.capture(None)
    try:
        yield
    finally:
        before.restore()


def _check_supported(trainer: Trainer) -> None:
    if trainer.accelerator.num_processes > 1:
        raise NotImplementedError(
            f"The analysis runs in one process, and there are {trainer.accelerator.num_processes}: load the checkpoint in one."
        )
    if trainer.accelerator.scaler is not None:
        raise NotImplementedError(
            "The analysis does not scale losses, and fp16 loses small gradients without it: set `bf16=True`, or neither."
        )


def _loss_in(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            "The model returns no loss for these batches: give them the labels by the name that the model knows them by, or a Trainer."
        )
    return loss


def _to(value: Any, weights: Mapping[str, Tensor]) -> Any:
    return value.to(next(iter(weights.values())).device) if isinstance(value, Tensor) else value


def _examples(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0), 1)
