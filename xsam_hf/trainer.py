"""
XSAM inside the Trainer: the Trainer's own passes are the first gradient; at the synchronising micro-batch the whole update
batch is replayed at the moved weights. Nothing else changes, so optimizers, schedules, loggers and checkpoints keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from .callback import XSAMCallback
from .compatibility import check_supported
from .perturbation import RandomState, drop_gradient
from .xsam import XSAMArguments, XSAMUpdate, xsam_gradient


logger = logging.get_logger(__name__)
# What the mixin is mixed into; a plain object at run time, so that it comes before any Trainer in the resolution order.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


@dataclass
class MicroBatch:
    """All that is needed to run one of the Trainer's passes again."""

    inputs: dict[str, Any]
    num_items_in_batch: Tensor | int | None
    accumulation_steps: int
    random_state: RandomState
    loss: Tensor


class XSAMMixin(_Trainer):
    """
    Gives any [`~transformers.Trainer`] XSAM's gradient: `class MyTrainer(XSAMMixin, SFTTrainer)`.

    The method's hyperparameters are read from `args` if it has them ([`XSAMTrainingArguments`]) and are the defaults of
    [`XSAMArguments`] otherwise. The reported loss stays L(θ_0), at the unperturbed weights.

    Raises:
        `ValueError`: the model has no trainable weights.
        `NotImplementedError`: the training set-up steps inside the backward pass, shards the batch's sequences or hides its
            gradients (DeepSpeed, FSDP1, layer-wise optimizers, ...); the message names the way out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._window: list[MicroBatch] = []
        self._sums: Tensor | None = None
        self.add_callback(XSAMCallback)
        check_supported(self, self.xsam_arguments)

    @property
    def xsam_arguments(self) -> XSAMArguments:
        """The method's fields of `args`, read anew each time: a hyperparameter search changes them between trials."""
        return XSAMArguments.of(self.args)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        arguments = self.xsam_arguments
        if arguments.rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            if arguments.ascent_scope == "micro":
                return self._micro_step(model, inputs, num_items_in_batch, arguments)
            micro_batch = self._first_pass(model, inputs, num_items_in_batch)
            self._window.append(micro_batch)
            # Not "the last of the chunk": an iterable data set's short last chunk takes no step, and its gradients (so its
            # micro-batches) carry over into the next epoch.
            if self.accelerator.sync_gradients:
                self._xsam_callback.schedule_search(arguments, self.state)
                self._update(model, self._window, arguments)
                self._window = []
        except BaseException:
            self._window = []
            raise
        return micro_batch.loss

    def _first_pass(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> MicroBatch:
        """The Trainer's own pass at θ_0, and what it takes to run it again."""
        random_state = RandomState.capture()
        loss = super().training_step(model, inputs, num_items_in_batch)
        return MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps, random_state, loss)

    def _update(self, model: nn.Module, window: list[MicroBatch], arguments: XSAMArguments) -> None:
        """One XSAM update from the window's micro-batches, whose gradients at θ_0 are in `p.grad` already."""
        callback = self._xsam_callback
        own_passes = [torch.stack([micro_batch.loss for micro_batch in window]).sum()]

        def gradient() -> Tensor:
            return own_passes.pop() if own_passes else self._replay(model, window)

        update = xsam_gradient(
            model,
            gradient,
            lambda: self._probe(model, window),
            replace(arguments, alpha_search_steps=None),  # the callback keeps the schedule
            callback.xsam,
            loss_scaling=self.accelerator.scaler is not None,
        )
        if update.search is not None:
            callback.record_search(self.args, self.state, update.search)
        self._add_up(update)

    def _replay(self, model: nn.Module, window: list[MicroBatch]) -> Tensor:
        """The Trainer's own passes over the window again, with the same random numbers; returns the loss."""
        gradient_state = self.accelerator.gradient_state
        loss = torch.zeros((), device=self.args.device)
        for micro_batch in window:
            synchronise = micro_batch is window[-1]
            self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
            gradient_state._set_sync_gradients(synchronise)
            micro_batch.random_state.restore()
            synchronise = synchronise or gradient_state.plugin_kwargs.get("sync_each_batch", False)
            with nullcontext() if synchronise else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, micro_batch.inputs, micro_batch.num_items_in_batch)
        return loss

    def _probe(self, model: nn.Module, window: list[MicroBatch]) -> Tensor:
        """The window's loss at the current weights from forward passes alone, averaged over processes."""
        loss = torch.zeros((), device=self.args.device)
        for micro_batch in window:
            micro_batch.random_state.restore()
            n = micro_batch.num_items_in_batch
            with torch.no_grad(), self.compute_loss_context_manager():
                # `_prepare_inputs` makes a new dict each time: label smoothing takes the labels out of it.
                part: Any = self.compute_loss(model, self._prepare_inputs(micro_batch.inputs), num_items_in_batch=n)
            # As in `Trainer.training_step`: a mean over one micro-batch is an equal share of the update batch's.
            scaled = self.loss_is_scaled_for_ga
            if scaled is None:
                scaled = (self.model_accepts_loss_kwargs and n is not None) or self.compute_loss_func is not None
            loss = loss + part.mean() / (1 if scaled else micro_batch.accumulation_steps)
            # FSDP2 leaves its root unsharded after a forward without a backward; the next pass would see stale weights.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return self.accelerator.reduce(loss, reduction="mean")

    def _micro_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        arguments: XSAMArguments,
    ) -> Tensor:
        """Each micro-batch of each process climbs on its own; one reduction of the final gradient at the end (m-SAM)."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        accumulated = [weight.grad for weight in weights]
        drop_gradient(weights)
        if all(gradient is None for gradient in accumulated):  # the first micro-batch of an update
            self._xsam_callback.schedule_search(arguments, self.state)
        synchronise = self.accelerator.sync_gradients
        with self.accelerator.no_sync(model):
            micro_batch = self._first_pass(model, inputs, num_items_in_batch)
            self._update(model, [micro_batch], arguments)
        self.accelerator.gradient_state._set_sync_gradients(synchronise)
        for weight, before in zip(weights, accumulated, strict=True):
            if before is not None:
                weight.grad = before if weight.grad is None else weight.grad.add_(before)
        if synchronise and self.accelerator.num_processes > 1:
            _average_over_processes(weights)
        return micro_batch.loss

    @property
    def _xsam_callback(self) -> XSAMCallback:
        # Looked up each time: `restore_callback_states_from_checkpoint` replaces callbacks by new instances.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, XSAMCallback))

    def _add_up(self, update: XSAMUpdate) -> None:
        """Adds the update's numbers to running sums on the device: reading them waits for the log."""
        sharpness = update.last_loss - update.loss
        seen = [update.angle, sharpness, update.grad_norm_first, update.grad_norm_last, update.fell_back]
        values = torch.stack([value.to(self.args.device, torch.float32) for value in seen])
        finite = torch.isfinite(values)
        sums = torch.stack([values.masked_fill(~finite, 0), finite.float()])
        self._sums = sums if self._sums is None else self._sums.add_(sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums is not None:
            sums, counts = self.accelerator.reduce(self._sums, reduction="mean").tolist()
            self._sums = None
            names = ["xsam/angle", "xsam/sharpness", "xsam/grad_norm_first", "xsam/grad_norm_last"]
            xsam, arguments = self._xsam_callback.xsam, self.xsam_arguments
            logs["xsam/alpha"] = xsam.alpha if arguments.alpha is None else arguments.alpha
            logs |= {name: sum_ / count for name, sum_, count in zip(names, sums, counts, strict=False) if count}
            if xsam.search_gain is not None:
                logs["xsam/search_gain"] = xsam.search_gain
            if xsam.alpha_at_edge is not None:
                logs["xsam/alpha_at_edge"] = float(xsam.alpha_at_edge)
            if sums[-1]:
                logs["xsam/fallbacks"] = sums[-1]
                logger.warning_once(
                    "A gradient at the perturbed weights was not finite: the update used the unperturbed one instead. "
                    "`xsam/fallbacks` counts such updates between two logs. If there are many, lower `rho`."
                )
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the Trainer's model card, which `push_to_hub` publishes, and adds the method's fields to it."""
        super().create_model_card(*args, **kwargs)
        arguments = self.xsam_arguments
        card = Path(str(self.args.output_dir)) / "README.md"
        if not self.is_world_process_zero() or arguments.rho == 0 or not card.is_file():
            return
        rows = [f"| {name} | {value} |" for name, value in asdict(arguments).items()]
        section = [
            "## XSAM",
            "",
            "Trained by `xsam_hf`, explicit sharpness-aware minimization (XSAM, ICLR 2026), with:",
            "",
            "| field | value |",
            "|---|---|",
            *rows,
        ]
        card.write_text(card.read_text(encoding="utf-8") + "\n".join(["", *section, ""]), encoding="utf-8")


class XSAMTrainer(XSAMMixin, Trainer):
    """[`~transformers.Trainer`] with XSAM's gradient. Takes exactly its arguments; see [`XSAMMixin`]."""


class XSAMSeq2SeqTrainer(XSAMMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with XSAM's gradient. Takes exactly its arguments; see [`XSAMMixin`]."""


def _average_over_processes(weights: Sequence[Tensor]) -> None:
    """The mean of every gradient over processes, in place; a weight that only some of them used counts zero elsewhere."""
    used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for weight, somewhere in zip(weights, used.tolist(), strict=True):
        if somewhere:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)
            weight.grad.div_(dist.get_world_size())
