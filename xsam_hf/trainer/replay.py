"""The Trainer's own passes over an update batch, kept and run again: at other weights, from the same state, unheard."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from ..arguments import XSAMArguments
from ..held_modules import items_of, parts_of
from ..module_state import StateFollower
from ..pass_state import PassState
from ..trainable import weights_of
from .compatibility import generates, tensor_parallel_size
from .micro_batch import MicroBatch, copy_of, random_subset
from .zero import ZeROWeights, engine_of, is_deepspeeds_own


# What the mixin is mixed into; a plain object at run time, so that it comes before any Trainer in the resolution order.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


_BROADCASTS = "require_forward_param_sync"  # of DistributedDataParallel


class ReplayMixin(_Trainer):
    """
    Passes over the micro-batches of one update: with gradients, or losses only.

    All go through the `training_step` of the class below in the resolution order, so that what a subclass of the Trainer does
    there happens in each of them.

    Attributes:
        first_pass_counters (`tuple[str, ...]`):
            Attributes of the trainer that count what `compute_loss` sees, as trl's and sentence-transformers' do. They keep what
            the first pass of an update counted; extend the tuple by your own.
    """

    first_pass_counters: tuple[str, ...] = (
        "_metrics",
        "_stored_metrics",
        "_total_train_tokens",
        "accum_loss_components",
    )

    _xsam_follower: StateFollower | None = None
    _xsam_generator: Any = None  # the model, without wrappers
    _xsam_micro_batches_seen = 0  # of the current update
    _xsam_replaying = False
    _xsam_shards: ZeROWeights | None = None

    @property
    def _xsam_zero(self) -> ZeROWeights | None:
        """The weights that DeepSpeed shards; `None` without it."""
        engine = engine_of(self)
        if engine is not None and (self._xsam_shards is None or self._xsam_shards.engine is not engine):
            self._xsam_shards = ZeROWeights(engine)
        return self._xsam_shards

    def _xsam_first_pass(
        self,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None,
        arguments: XSAMArguments,
        by_content: bool,
    ) -> MicroBatch:
        """The Trainer's own pass at θ_0, and what it takes to run it again. For `by_content` see [`StateFollower.capture`]."""
        inputs = send_to_device(inputs, self.args.device)
        if self._xsam_follower is None:  # the first pass of this training
            self._xsam_follower = follower_of(self)
            self._xsam_generator = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        kept, n = copy_of((inputs, num_items_in_batch))
        micro_batch = MicroBatch(
            kept,
            n,
            self.current_gradient_accumulation_steps,
            PassState.capture(self._xsam_follower, by_content),
            getattr(model, _BROADCASTS, None),
        )
        if arguments.ascent_fraction < 1:
            # Processes that share a model see the same batch, and cut it alike.
            which = self.args.process_index // tensor_parallel_size(self)
            key = [self.args.seed, self.state.global_step, self._xsam_micro_batches_seen, which]
            labels = [*self.label_names, "labels"]
            micro_batch.subset, micro_batch.size = random_subset(inputs, arguments.ascent_fraction, key, labels)
        if micro_batch.subset is not None:
            inputs, num_items_in_batch = micro_batch.inputs(whole=False)
        zero = self._xsam_zero
        with self._xsam_generation_refused(), zero.step_held() if zero else nullcontext():
            micro_batch.loss = super().training_step(model, inputs, num_items_in_batch)
        micro_batch.before.learn()
        self._xsam_micro_batches_seen = 0 if self.accelerator.sync_gradients else self._xsam_micro_batches_seen + 1
        return micro_batch

    def _xsam_replay(self, model: nn.Module, micro_batches: Sequence[MicroBatch], whole: bool) -> Tensor:
        """The passes over an update batch once more, the first of them from the state that stands; returns the loss."""
        loss = torch.zeros((), device=self.args.device)
        # DeepSpeed reduces gradients by itself, and the Trainer lets it.
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False) or self._xsam_zero
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            self.accelerator.sync_gradients = last
            with nullcontext() if last or each else self.accelerator.no_sync(model):
                loss = loss + self._xsam_pass_again(model, micro_batch, micro_batches, whole)
        return loss

    def _xsam_probe(self, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The loss of an update batch at the current weights from forward passes alone, averaged over processes."""
        loss = torch.zeros((), device=self.args.device)
        with self._xsam_backward_standing_still():
            for micro_batch in micro_batches:
                # A loss that differentiates inside is probed with gradients, for which DDP must not wait.
                with self.accelerator.no_sync(model) if torch.is_grad_enabled() else nullcontext():
                    try:
                        loss = loss + self._xsam_pass_again(model, micro_batch, micro_batches, whole=True)
                    except (AttributeError, TypeError) as error:
                        if "NoneType" not in str(error):
                            raise
                        raise NotImplementedError(
                            f"The `training_step` of {type(self).__name__} seems to look at gradients, which the forward passes of a "
                            f"search do not make ({error}): let it pass over weights whose `grad` is None, or fix `alpha`."
                        ) from error
                # FSDP2 leaves its root unsharded after a forward without a backward; the next pass would see stale weights.
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
        self._xsam_wait_for_offload(model)
        return self.accelerator.reduce(loss, reduction="mean")

    def _xsam_wait_for_offload(self, model: nn.Module) -> None:
        """
        FSDP2's CPU offload copies pinned shards to the device without waiting, and the next probe writes over them.

        A backward pass waits for itself, one without it does not.
        """
        if self.args.device.type != "cpu" and next(model.parameters()).device.type == "cpu":
            torch.accelerator.synchronize()

    def _xsam_pass_again(
        self, model: nn.Module, micro_batch: MicroBatch, micro_batches: Sequence[MicroBatch], whole: bool
    ) -> Tensor:
        if micro_batch is not micro_batches[0]:  # before the first, the state is put back already
            micro_batch.before.restore()
        self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
        if micro_batch.broadcasts is not None:  # of buffers, which DDP decides by the pass before
            setattr(model, _BROADCASTS, micro_batch.broadcasts)
        return super().training_step(model, *micro_batch.inputs(whole))

    @contextmanager
    def _xsam_unheard(self, model: nn.Module) -> Iterator[None]:
        """For the later passes of an update: nothing is logged, and counters keep what the first pass counted."""
        kept = {name: copy.deepcopy(getattr(self, name)) for name in self.first_pass_counters if hasattr(self, name)}
        broadcasts = getattr(model, _BROADCASTS, None)
        self._xsam_replaying = True
        try:
            yield
        finally:
            self._xsam_replaying = False
            for name, value in kept.items():
                setattr(self, name, value)
            if broadcasts is not None:
                setattr(model, _BROADCASTS, broadcasts)

    @contextmanager
    def _xsam_backward_standing_still(self) -> Iterator[None]:
        with _replaced(self.accelerator, "backward", lambda *args, **kwargs: None):
            yield

    def _xsam_generation_refused(self) -> AbstractContextManager:
        """In the first pass of every update: some trainers toss a coin whether they generate."""

        def generate(*args, **kwargs):
            raise generates(self)

        model = self._xsam_generator
        return _replaced(model, "generate", generate) if hasattr(model, "generate") else nullcontext()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A method of one object replaced within the block; its class's method is back afterwards, or the object's own."""
    own = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, own)


def follower_of(trainer: Trainer) -> StateFollower:
    """Follows the modules that hang on the trainer and on its loss: the model, a teacher; and both's own attributes."""
    loss = [trainer.compute_loss_func, *parts_of(trainer.compute_loss_func)]
    plain = [
        thing for thing in (trainer, *loss) if hasattr(thing, "__dict__") and not isinstance(thing, nn.Module | type)
    ]
    holders = [vars(thing) for thing in {id(thing): thing for thing in plain}.values()]
    held = [inner for values in holders for value in values.values() for inner in items_of(value)]
    engine = engine_of(trainer)  # around the model, with books of its own
    things = [thing for thing in (trainer.model, *loss, *held) if thing is not engine]
    modules = [thing for thing in things if isinstance(thing, nn.Module)]

    def trained() -> list[Tensor]:
        return [*cast(nn.Module, trainer.model).parameters(), *weights_of(trainer.optimizer)]

    return StateFollower(modules, holders, trained, None if engine is None else is_deepspeeds_own)
