"""
XSAM inside the Trainer: the Trainer's own passes are the first gradient; at the synchronising micro-batch the whole update
batch is replayed at the moved weights. Nothing else changes, so optimizers, schedules, loggers and checkpoints keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .callback import XSAMCallback
from .checkpoint import last_whole_checkpoint, load_tensors, save_tensors
from .compatibility import check_supported
from .hyperparameters import XSAMArguments
from .meter import UpdateMeter
from .micro_batch import MicroBatch
from .model_card import add_section
from .perturbation import RandomState, drop_gradient, perturbed_and_excluded
from .replay import ReplayMixin
from .schedule import sharp_at
from .xsam import xsam_gradient


logger = logging.get_logger(__name__)


class XSAMMixin(ReplayMixin):
    """
    Gives any [`~transformers.Trainer`] XSAM's gradient: `class MyTrainer(XSAMMixin, SFTTrainer)`.

    The method's hyperparameters are read from `args` if it has them ([`XSAMTrainingArguments`]) and are the defaults of
    [`XSAMArguments`] otherwise. The reported loss stays L(θ_0), at the unperturbed weights.

    Raises:
        `ValueError`: the model has no trainable weights.
        `NotImplementedError`: the training set-up steps inside the backward pass, shards the batch's sequences or hides its
            gradients (DeepSpeed, FSDP1, layer-wise optimizers, ...); the message names the way out. At the first update: the
            optimizer steps weights outside the model, such as a loss's own, in several processes. In one they are perturbed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._window: list[MicroBatch] = []
        self._meter = UpdateMeter()
        self._tensors_to_load: str | None = None
        self.add_callback(XSAMCallback)
        check_supported(self, self.xsam_arguments)

    @property
    def xsam_arguments(self) -> XSAMArguments:
        """The method's fields of `args`, read anew each time: a hyperparameter search changes them between trials."""
        return XSAMArguments.of(self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        # A training that was stopped between two micro-batches leaves something behind.
        self._window, self._micro_batches, self._meter = [], 0, UpdateMeter()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(str(self.args.output_dir)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        arguments = self.xsam_arguments
        if arguments.rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        callback, step = self._xsam_callback, self.state.global_step
        callback.schedule_search(arguments, self.state)
        self._load_tensors(arguments)
        sharp = sharp_at(arguments, step, self.state.max_steps)
        if not sharp and arguments.sharpness_between == "plain":
            if self.accelerator.sync_gradients:
                self._meter.add(passes=1)
            return super().training_step(model, inputs, num_items_in_batch)
        arguments = replace(arguments, rho=arguments.rho if sharp else 0.0)
        try:
            if arguments.ascent_scope == "micro":
                return self._micro_step(model, inputs, num_items_in_batch, arguments)
            micro_batch = self._first_pass(model, inputs, num_items_in_batch, arguments)
            self._window.append(micro_batch)
            # Not "the last of the chunk": an iterable data set's short last chunk takes no step, and its gradients (so its
            # micro-batches) carry over into the next epoch.
            if self.accelerator.sync_gradients:
                self._update(model, self._window, arguments)
                self._window = []
        except BaseException:
            self._window = []
            raise
        return micro_batch.loss

    def _update(self, model: nn.Module, window: list[MicroBatch], arguments: XSAMArguments) -> None:
        """One XSAM update from the window's micro-batches, whose gradients at θ_0 are in `p.grad` already."""
        callback = self._xsam_callback
        own_passes = [torch.stack([micro_batch.loss for micro_batch in window]).sum()]
        to_come = arguments.ascent_steps + 1
        end: RandomState | None = None

        def gradient() -> Tensor:
            nonlocal to_come, end
            to_come -= 1
            with self._counters_kept():
                loss = own_passes.pop() if own_passes else self._replay(model, window, whole=to_come == 0)
            end = RandomState.capture() if to_come == 0 else None
            # Norms are of the reduced gradient, and a slope has to be of the same loss.
            sloping = arguments.gradient_scale.startswith("slope")
            return self.accelerator.reduce(loss, reduction="mean") if sloping else loss

        # The callback and `sharp_at` keep the schedules, which may be shares of all updates.
        now = replace(arguments, alpha_search_steps=None, sharpness_start=0.0, sharpness_end=1.0, sharpness_every=1)
        update = xsam_gradient(
            self._trained_module(arguments),
            gradient,
            lambda: self._probe(model, window),
            now,
            callback.xsam,
            loss_scaling=self.accelerator.scaler is not None,
        )
        share = sum(micro_batch.share for micro_batch in window) / len(window)
        if arguments.rho > 0 and share < 1 and end is not None:
            end.restore()  # where a pass over the whole batch leaves it, as in plain training
        if update.search is not None:
            callback.record_search(self.args, self.state, update.search)
        if arguments.rho > 0:
            self._meter.add(1 + share * arguments.ascent_steps, update)
        else:
            self._meter.add(passes=1)

    def _micro_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        arguments: XSAMArguments,
    ) -> Tensor:
        """Each micro-batch of each process climbs on its own; one reduction of the final gradient at the end (m-SAM)."""
        weights = [weight for weight in self._trained_module(arguments).parameters() if weight.requires_grad]
        accumulated = [weight.grad for weight in weights]
        drop_gradient(weights)
        synchronise = self.accelerator.sync_gradients
        with self.accelerator.no_sync(model):
            micro_batch = self._first_pass(model, inputs, num_items_in_batch, arguments)
            self._update(model, [micro_batch], arguments)
        self.accelerator.gradient_state._set_sync_gradients(synchronise)
        for weight, before in zip(weights, accumulated, strict=True):
            if before is not None:
                weight.grad = before if weight.grad is None else weight.grad.add_(before)
        if synchronise and self.accelerator.num_processes > 1:
            _average_over_processes(weights)
        return micro_batch.loss

    def _trained_module(self, arguments: XSAMArguments) -> nn.Module:
        """
        The model; if the optimizer steps other weights too, as those of a loss (sentence-transformers), with these.

        Raises:
            `NotImplementedError`: there are such weights and several processes, of which each has its own gradient for them.
        """
        model: Any = self.model
        if arguments.rho_exclude:  # compiled parts have other names; looking for them takes a millisecond an update
            model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        optimizer: Any = self.optimizer
        inside = set(model.parameters())
        others = [w for group in optimizer.param_groups for w in group["params"] if w not in inside]
        if not others:
            return model
        if self.accelerator.num_processes > 1:
            raise NotImplementedError(
                "The optimizer steps weights outside the model, such as a loss's own, whose gradients nobody averages over "
                "processes: make them a part of the model, train in one process, or set `rho` to 0."
            )
        return nn.ModuleList([model, nn.ParameterList(others)])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # a folder that is written anew is not whole until it has its new trainer_state.json
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Process 0 writes trainer_state.json next. A checkpoint without another one's numbers would resume, but otherwise.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_tensors(self._xsam_callback.xsam.tensors, Path(output_dir), self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._tensors_to_load = (
            checkpoint  # by the first step: the callback that is to have them may be replaced until then
        )

    def _load_tensors(self, arguments: XSAMArguments) -> None:
        if self._tensors_to_load is not None:
            weights, _ = perturbed_and_excluded(self._trained_module(arguments), arguments.rho_exclude)
            callback = self._xsam_callback
            callback.xsam.tensors = load_tensors(Path(self._tensors_to_load), weights, callback.tensors_saved)
            self._tensors_to_load = None

    @property
    def _xsam_callback(self) -> XSAMCallback:
        # Looked up each time: `restore_callback_states_from_checkpoint` replaces callbacks by new instances.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, XSAMCallback))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seen = self._meter.read(
                self.xsam_arguments, self._xsam_callback.xsam, lambda x: self.accelerator.reduce(x, reduction="mean")
            )
            logs |= seen
            if "xsam/fallbacks" in seen:
                logger.warning_once(
                    "A gradient at the perturbed weights was not finite: the update used the unperturbed one instead. "
                    "`xsam/fallbacks` counts such updates between two logs. If there are many, lower `rho`."
                )
            if seen.get("xsam/perturbation_kept", 1.0) < 0.9:
                logger.warning_once(
                    f"Rounding to the weights' precision left {seen['xsam/perturbation_kept']:.0%} of the first ascent step. Load "
                    "the model with `dtype=torch.float32`, or set `perturbation_dtype='stochastic'`."
                )
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the Trainer's model card, which `push_to_hub` publishes, and adds the method's fields to it."""
        super().create_model_card(*args, **kwargs)
        arguments = self.xsam_arguments
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and arguments.rho > 0 and card.is_file():
            add_section(card, arguments)


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
