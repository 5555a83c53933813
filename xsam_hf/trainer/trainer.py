"""
XSAM inside the Trainer: the Trainer's own passes are the first gradient; at the synchronising micro-batch the whole update
batch is replayed at the moved weights. Nothing else changes, so optimizers, schedules, loggers and checkpoints keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..arguments import XSAMArguments
from ..arithmetic import copy_
from ..geometry import together
from ..pass_state import RandomState
from ..schedule import ascends_at
from ..seen import SeenAscent
from ..stale import climbed
from ..trainable import weights_of
from ..unread import warn_of_unread
from ..weights import MovableWeights, drop_gradients
from ..xsam import xsam_gradient
from .callback import XSAMCallback
from .checkpoint import CheckpointMixin
from .compatibility import check_fields, check_plain_fields, check_supported
from .earlier_gradients import EarlierGradients
from .logs import UpdateSums
from .micro_batch import MicroBatch
from .model_card import add_section, with_tags
from .precision import taken_rounded, warning_of
from .replay import ReplayMixin


logger = logging.get_logger(__name__)


class XSAMMixin(CheckpointMixin, ReplayMixin):
    """
    Gives any [`~transformers.Trainer`] XSAM's gradient: `class MyTrainer(XSAMMixin, SFTTrainer)`.

    The method's hyperparameters are read from `args` if they are [`XSAMTrainingArguments`] (or another [`XSAMArguments`]),
    and are the defaults otherwise. A class attribute `xsam_arguments = XSAMArguments(...)` sets them where `args` has a field of
    the same name with another meaning. The reported loss stays L(θ_0), at the unperturbed weights; with stale ascent, which has no
    other pass, it is L(θ_0 + ε).

    Raises:
        `TypeError`: a class has it behind the Trainer, whose `training_step` asks no other.
        `ValueError`: the model has no trainable weights, or `args` is an [`XSAMArguments`] without the Trainer's fields.
        `NotImplementedError`: the training set-up steps inside the backward pass, shards the batch's sequences or hides its
            gradients (FSDP1, layer-wise optimizers, most settings of DeepSpeed, ...); the message names the way out. As soon as
            the training step generates its data. At the first update: the first pass changes what cannot be put back for the
            others; the optimizer steps weights outside the model, such as a loss's own, in several processes. In one they are
            perturbed.
    """

    _xsam_optimizer: Optimizer | None = None  # that the names below were collected for

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(XSAMMixin):  # whose `training_step` calls no other
            raise TypeError(
                f"{cls.__name__} has the Trainer in front of XSAMMixin, which would never be asked: put XSAMMixin in front, "
                f"`class {cls.__name__}(XSAMMixin, ...)`."
            )

    def __init__(self, *args, **kwargs):
        for given in (*args, *kwargs.values()):
            if isinstance(given, XSAMArguments) and not isinstance(given, TrainingArguments):
                raise ValueError(
                    f"`args` is {type(given).__name__}, which has the method's fields alone: give XSAMTrainingArguments, which has the "
                    "Trainer's as well."
                )
        super().__init__(*args, **kwargs)
        self._xsam_begin_anew()
        check_supported(self, self.xsam_arguments)

    @property
    def xsam_arguments(self) -> XSAMArguments:
        """The method's fields of `args`, read anew each time: a hyperparameter search changes them between trials."""
        check_plain_fields(self.args)
        return XSAMArguments.of(self.args)

    @xsam_arguments.setter
    def xsam_arguments(self, value: XSAMArguments) -> None:
        raise AttributeError(
            "`xsam_arguments` is read from `args`: set the fields there, `trainer.args.rho = 0.1`, or give your trainer's class an "
            "attribute, `xsam_arguments = XSAMArguments(rho=0.1)`."
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self._xsam_begin_anew()
        warn_of_unread(self.xsam_arguments)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _xsam_begin_anew(self) -> None:
        """Forgets what a training that was stopped between two micro-batches left behind."""
        self._xsam_micro_batches: list[MicroBatch] = []  # of the current update
        self._xsam_earlier, self._xsam_sums = EarlierGradients(), UpdateSums()
        self._xsam_seen: SeenAscent | None = None
        self._xsam_follower, self._xsam_optimizer, self._xsam_shards = None, None, None
        self._xsam_named: dict[str, Tensor] = {}
        self._xsam_ran = self._xsam_warned = False
        self._xsam_micro_batches_seen = self._xsam_updates = 0
        check_fields(self)
        if self.xsam_arguments.rho == 0:  # the plain Trainer, list of callbacks included
            self.remove_callback(XSAMCallback)
        else:
            _ = self._xsam_callback  # adds it

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._xsam_ran, arguments = True, self.xsam_arguments
        if arguments.rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        self._xsam_callback.schedule_search(arguments, self.state)
        # Also where XSAM is off for now: the next checkpoint is to have its averages again.
        if self._xsam_checkpoint is not None:
            weights, _ = self._xsam_weights()
            self._xsam_read_average({**self._xsam_named, **weights})
        if not ascends_at(arguments, self.state.global_step, self.state.max_steps):
            if self.accelerator.sync_gradients:
                self._xsam_sums.add(passes=1)
            return super().training_step(model, inputs, num_items_in_batch)
        # A schedule-free optimizer moves the weights when it is told that training goes on, after an evaluation for instance: before
        # the ascent, and in no pass.
        if callable(train := getattr(self.optimizer, "train", None)):
            train()
        if self._xsam_seen is None:  # the first update with an ascent
            zero = self._xsam_zero
            self._xsam_seen = SeenAscent(taken_rounded(self, arguments.rho) if zero is None else zero.taken_in_half())
        try:
            if arguments.ascent_scope == "micro":
                return self._xsam_micro_step(model, inputs, num_items_in_batch, arguments)
            trained = self._xsam_trained() if self._xsam_zero is None else []  # DeepSpeed has no `p.grad`
            self._xsam_earlier.before_pass(trained, not self._xsam_micro_batches, self.accelerator.num_processes)
            may_wait = self._xsam_may_wait(arguments)
            first = partial(self._xsam_first_pass, model, inputs, num_items_in_batch, arguments, may_wait)
            if arguments.perturbation == "stale":
                micro_batch = self._xsam_climb_first(first, arguments)
            else:
                micro_batch = first()
            self._xsam_micro_batches.append(micro_batch)
            # Not "the last of the chunk": an iterable data set's short last chunk takes no step, and its gradients (so its
            # micro-batches) carry over into the next epoch.
            if self.accelerator.sync_gradients:
                self._xsam_update(model, self._xsam_micro_batches, arguments)
                self._xsam_earlier.add()
                self._xsam_micro_batches, self._xsam_updates = [], self._xsam_updates + 1
            else:
                self._xsam_earlier.after_pass(trained)
        except BaseException:
            self._xsam_micro_batches = []
            raise
        return micro_batch.loss

    def _xsam_climb_first(self, first_pass: Callable[[], MicroBatch], arguments: XSAMArguments) -> MicroBatch:
        """The only pass of a stale update, at moved weights, which are back when it ends: no callback ever sees them away."""
        weights, _ = self._xsam_weights()
        state = self._xsam_callback.xsam
        theta = MovableWeights(weights, arguments, state.updates, state.memory, self._xsam_seen)
        with climbed(theta, arguments, state) as stoppable:
            return stoppable(first_pass)

    @property
    def _xsam_is_logged(self) -> bool:
        """Whether a log follows the coming update, as far as can be told: SAM needs no angle, it is measured for logs alone."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return True
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def _xsam_may_wait(self, arguments: XSAMArguments) -> bool:
        """
        Whether the coming update may wait for the device, to see what its first pass moves. An update with a search waits anyway.

        The first two of a training do: what moves at all moves there, also a teacher that begins as a copy of its student.
        """
        searching = arguments.searches and self._xsam_callback.xsam.search_due
        return searching or self._xsam_updates < 2

    def _xsam_update(self, model: nn.Module, micro_batches: Sequence[MicroBatch], arguments: XSAMArguments) -> None:
        """One XSAM update from micro-batches whose gradients at θ_0 are in `p.grad` already."""
        callback, (weights, unstepped) = self._xsam_callback, self._xsam_weights()
        share = sum(micro_batch.share for micro_batch in micro_batches) / len(micro_batches)
        first = [torch.stack([micro_batch.loss for micro_batch in micro_batches]).sum()]
        to_come, end = arguments.ascent_steps + 1, None

        def gradient() -> Tensor:
            nonlocal to_come, end
            to_come -= 1
            if first:
                loss = first.pop()
            else:
                drop_gradients(unstepped)
                loss = self._xsam_replay(model, micro_batches, whole=to_come == 0)
            if to_come == 0 and share < 1:
                end = RandomState.capture()
            # Norms are of the reduced gradient: so that all processes fall back together, losses are of the same.
            return loss if arguments.ascent_scope == "micro" else self.accelerator.reduce(loss, reduction="mean")

        ascend = all(
            [micro_batch.before.complete for micro_batch in micro_batches]
        )  # every first pass has been looked at
        stale = arguments.perturbation == "stale"  # it has climbed already, and repeats no pass
        with self._xsam_unheard(model):
            update = (xsam_gradient if self._xsam_zero is None else self._xsam_zero.update)(
                weights,
                gradient,
                lambda: self._xsam_probe(model, micro_batches),
                arguments,
                callback.xsam,
                ascend=ascend or stale,
                before=micro_batches[0].before,
                loss_scaling=self.accelerator.scaler is not None,
                measure=arguments.searches or self._xsam_is_logged,
                seen=self._xsam_seen,
            )
        callback.step_due = True
        if end is not None:
            end.restore()  # where a pass over the whole batch leaves it, as in plain training
        if update.search is not None:
            callback.record_search(self.args, self.state, update.search)
        if stale:
            self._xsam_sums.add(1, update)
        elif ascend:
            self._xsam_sums.add(1 + share * arguments.ascent_steps, update)
        else:
            self._xsam_sums.add(passes=1)

    def _xsam_micro_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        arguments: XSAMArguments,
    ) -> Tensor:
        """Each micro-batch of each process climbs on its own; one reduction of the final gradient at the end (m-SAM)."""
        weights = self._xsam_trained()
        accumulated = [weight.grad for weight in weights]
        drop_gradients(weights)
        synchronise = self.accelerator.sync_gradients
        with self.accelerator.no_sync(model):
            may_wait = self._xsam_may_wait(arguments)
            micro_batch = self._xsam_first_pass(model, inputs, num_items_in_batch, arguments, may_wait)
            self._xsam_update(model, [micro_batch], arguments)
        self.accelerator.sync_gradients = synchronise
        self._xsam_updates += synchronise
        for weight, before in zip(weights, accumulated, strict=True):
            if before is not None:
                weight.grad = before if weight.grad is None else weight.grad.add_(before)
        if synchronise and self.accelerator.num_processes > 1:
            _average_over_processes(weights)
        return micro_batch.loss

    def _xsam_weights(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """
        The weights that the optimizer steps, by name, and the model's other trainable ones.

        Only the former are perturbed: to climb with weights that do not descend would be another objective.

        Raises:
            `ValueError`: the optimizer steps none of the model's trainable weights.
            `NotImplementedError`: it steps weights outside the model, such as a loss's own, in several processes.
        """
        if self._xsam_zero is not None:
            return dict(self._xsam_zero.weights), []
        optimizer: Any = self.optimizer
        if self._xsam_optimizer is not optimizer:
            self._xsam_optimizer, model = optimizer, self.model
            assert model is not None
            # Names as they are without torch.compile.
            self._xsam_named = {name.replace("_orig_mod.", ""): w for name, w in model.named_parameters()}
        stepped = {id(weight): weight for weight in weights_of(optimizer)}
        trained = {name: weight for name, weight in self._xsam_named.items() if weight.requires_grad}
        weights: dict[str, Tensor] = {name: weight for name, weight in trained.items() if id(weight) in stepped}
        if not weights:
            raise ValueError(
                "The optimizer steps none of the model's trainable weights, so XSAM has none to perturb: build it from "
                "`model.parameters()`, or set `rho` to 0."
            )
        inside = set(map(id, self._xsam_named.values()))
        outside = [weight for key, weight in stepped.items() if key not in inside and weight.requires_grad]
        if outside and self.accelerator.num_processes > 1:
            raise NotImplementedError(
                "The optimizer steps weights outside the model, such as a loss's own, whose gradients nobody averages over "
                "processes: make them a part of the model, train in one process, or set `rho` to 0."
            )
        weights |= {f"outside_the_model.{i}": weight for i, weight in enumerate(outside)}
        return weights, [weight for name, weight in trained.items() if name not in weights]

    def _xsam_trained(self) -> list[Tensor]:
        """All weights that a pass gives a gradient."""
        stepped, unstepped = self._xsam_weights()
        return [*stepped.values(), *unstepped]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._xsam_replaying:  # `compute_loss` may log; it did so in the first pass
            return
        arguments = self.xsam_arguments
        if not logs.keys().isdisjoint(("loss", "train_loss")) and arguments.rho > 0:
            # A run that is resumed at its end makes no pass.
            stepped = self.state.global_step > self._xsam_callback.began
            if stepped and not (self._xsam_ran or self._xsam_warned):
                self._xsam_warned = True
                logger.warning(
                    f"No pass went through XSAM: the `training_step` of {type(self).__name__} or of one of its bases does not "
                    "call `super().training_step`. Let it do so, or put XSAMMixin in front of it: `class X(XSAMMixin, ...)`."
                )
        if "loss" in logs and arguments.rho > 0:
            seen = self._xsam_sums.read(
                arguments, self._xsam_callback.xsam, lambda x: self.accelerator.reduce(x, reduction="mean")
            )
            if self._xsam_seen is not None and (measure := self._xsam_seen.read()):
                seen |= {f"xsam/seen_{name}": value for name, value in measure.items()}
                if warning := warning_of(measure, self._xsam_seen.in_half):
                    logger.warning(warning)
            logs |= seen
            if "xsam/fallbacks" in seen:
                logger.warning_once(
                    "A loss or gradient at the perturbed weights was not finite: the update used the unperturbed gradient instead. "
                    "`xsam/fallbacks` counts such updates between two logs. If there are many, lower `rho`."
                )
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the model card, which `push_to_hub` publishes, with tags and a section of the method's."""
        arguments = self.xsam_arguments
        if arguments.rho > 0 and len(args) > 2:  # the third one is `tags`, in the Trainer's signature and in trl's
            args = (*args[:2], with_tags(args[2]), *args[3:])
        elif arguments.rho > 0:
            kwargs["tags"] = with_tags(kwargs.get("tags"))
        super().create_model_card(*args, **kwargs)
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
    gradients = []
    for weight, somewhere in zip(weights, used.tolist(), strict=True):
        if somewhere:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
    for kind in {(gradient.device, gradient.dtype): None for gradient in gradients}:
        # As DDP does: one reduction for many gradients, which stand in one piece of memory for it.
        for (some,) in together([gradient for gradient in gradients if (gradient.device, gradient.dtype) == kind]):
            flat = torch.cat([gradient.reshape(-1) for gradient in some])
            dist.all_reduce(flat)
            flat.div_(dist.get_world_size())
            parts = flat.split([gradient.numel() for gradient in some])
            copy_(some, [part.view_as(gradient) for part, gradient in zip(parts, some, strict=True)])
