"""The Trainer's own passes over an update batch, kept and run again: at other weights, with the same random numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from .hyperparameters import XSAMArguments
from .micro_batch import MicroBatch, random_part
from .perturbation import RandomState


# What the mixin is mixed into; a plain object at run time, so that it comes before any Trainer in the resolution order.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class ReplayMixin(_Trainer):
    """Passes over a window, which is the list of the micro-batches of one update: with gradients, or losses only."""

    _micro_batches = 0  # of the current update, so far

    def _first_pass(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        arguments: XSAMArguments,
    ) -> MicroBatch:
        """The Trainer's own pass at θ_0, and what it takes to run it again."""
        part, share = inputs, 1.0
        if arguments.rho > 0 and arguments.ascent_fraction < 1:
            key = [self.args.seed, self.state.global_step, self._micro_batches, self.args.process_index]
            part, share = random_part(inputs, arguments.ascent_fraction, key)
        steps = self.current_gradient_accumulation_steps
        micro_batch = MicroBatch(inputs, num_items_in_batch, steps, RandomState.capture(), part, share, torch.empty(0))
        micro_batch.loss = super().training_step(model, *micro_batch.of_part())
        self._micro_batches = 0 if self.accelerator.sync_gradients else self._micro_batches + 1
        return micro_batch

    def _replay(self, model: nn.Module, window: list[MicroBatch], whole: bool) -> Tensor:
        """The Trainer's own passes over the window again, with the same random numbers; returns the loss."""
        gradient_state = self.accelerator.gradient_state
        loss = torch.zeros((), device=self.args.device)
        for micro_batch in window:
            synchronise = micro_batch is window[-1]
            self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
            gradient_state._set_sync_gradients(synchronise)
            micro_batch.random_state.restore()
            inputs, n = (micro_batch.inputs, micro_batch.num_items_in_batch) if whole else micro_batch.of_part()
            synchronise = synchronise or gradient_state.plugin_kwargs.get("sync_each_batch", False)
            with nullcontext() if synchronise else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, inputs, n)
        return loss

    @contextmanager
    def _counters_kept(self) -> Iterator[None]:
        """Keeps what trl's and sentence-transformers' trainers count in `compute_loss` to the first pass, at θ_0."""
        names = ("_metrics", "_total_train_tokens", "accum_loss_components")
        kept = {name: copy.deepcopy(getattr(self, name)) for name in names if hasattr(self, name)}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _probe(self, model: nn.Module, window: list[MicroBatch]) -> Tensor:
        """The window's loss at the current weights from forward passes alone, averaged over processes."""
        with self._counters_kept():
            return self.accelerator.reduce(self._window_loss(model, window), reduction="mean")

    def _window_loss(self, model: nn.Module, window: list[MicroBatch]) -> Tensor:
        loss = torch.zeros((), device=self.args.device)
        for micro_batch in window:
            micro_batch.random_state.restore()
            n = micro_batch.num_items_in_batch
            with torch.no_grad(), self.compute_loss_context_manager():
                # `_prepare_inputs` makes a new dict each time: label smoothing takes the labels out of it.
                part: Any = self.compute_loss(model, self._prepare_inputs(micro_batch.inputs), num_items_in_batch=n)
            # As in `Trainer.training_step`: a mean over one micro-batch is an equal share of the update batch's.
            scaled = getattr(self, "loss_is_scaled_for_ga", None)  # not before transformers 5.20
            if scaled is None:
                scaled = (self.model_accepts_loss_kwargs and n is not None) or self.compute_loss_func is not None
            loss = loss + part.mean() / (1 if scaled else micro_batch.accumulation_steps)
            # FSDP2 leaves its root unsharded after a forward without a backward; the next pass would see stale weights.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return loss
