"""The mean of a run's last checkpoints, as fairseq's average_checkpoints.py makes it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from tasks.checkpoints import check_digests


class SavedSteps(TrainerCallback, ExportableState):
    """
    The steps at which this run saved a checkpoint, so that those of an earlier run in the same folder do not count.

    A resumed run takes them from the checkpoint that it goes on with, whatever `restore_callback_states_from_checkpoint`
    says.
    """

    def __init__(self):
        self.steps: list[int] = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"steps": list(self.steps)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.steps = []
        name = type(self).__name__
        if state.global_step > 0:
            # What a checkpoint knows was written before it, so that its own step is missing there.
            before = state.stateful_callbacks.get(name, self.state())
            self.steps = [*before["attributes"]["steps"], state.global_step]
        state.stateful_callbacks[name] = self.state()  # the Trainer saves only what is listed here

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.steps.append(state.global_step)


def check_averaging(count: int, args: TrainingArguments) -> None:
    """
    Refuses an average of more checkpoints than the run will have at its end, as far as its arguments tell.

    Args:
        count (`int`): how many are averaged; 0 for none.
        args ([`TrainingArguments`]): when the run saves, and how many it keeps.

    Raises:
        `ValueError`: it saves none or too few, or keeps too few.
    """
    if not count:
        return
    if args.save_strategy == SaveStrategy.NO:
        raise ValueError(f"`average_checkpoints` is {count}, but `save_strategy` is no: give epoch, or steps.")
    # The best checkpoint is kept besides the last ones.
    needed = count + args.load_best_model_at_end
    if args.save_total_limit is not None and args.save_total_limit < needed:
        raise ValueError(
            f"`average_checkpoints` is {count}, but `save_total_limit` is {args.save_total_limit}: raise it to {needed}."
        )
    saved = math.inf
    if args.save_strategy == SaveStrategy.EPOCH and args.max_steps <= 0:
        saved = math.ceil(args.num_train_epochs)
    elif args.save_strategy == SaveStrategy.STEPS and args.save_steps < 1:  # a share of the run
        saved = math.ceil(1 / args.save_steps)
    elif args.save_strategy == SaveStrategy.STEPS and args.max_steps > 0:
        saved = math.ceil(args.max_steps / args.save_steps)
    if saved < count:
        raise ValueError(
            f"`average_checkpoints` is {count}, but the run saves {saved} checkpoints: save more often, or average fewer."
        )


def average_checkpoints(model: torch.nn.Module, folder: Path, steps: list[int], count: int) -> None:
    """
    Loads the mean of the last checkpoints' weights into a model.

    Args:
        model (`torch.nn.Module`): changed in place.
        folder (`Path`): the Trainer's output folder.
        steps (`list[int]`): at which the run saved; see [`SavedSteps`].
        count (`int`): how many checkpoints, the newest of those that were kept.

    Raises:
        `ValueError`: fewer were kept, or one holds other weights than were saved in it.
    """
    places = [folder / f"{PREFIX_CHECKPOINT_DIR}-{step}" / "model.safetensors" for step in sorted(set(steps))]
    kept = [file for file in places if file.is_file()]
    if len(kept) < count:
        raise ValueError(
            f"`average_checkpoints` is {count}, but {folder} holds {len(kept)} checkpoints of this run: save more often, "
            "raise `save_total_limit`, or average fewer."
        )
    states = []
    for file in kept[-count:]:
        check_digests(file.parent)
        states.append(load_file(file))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # In double precision: the mean of equal numbers is that number.
            weight.copy_(sum(state[name].double() for state in states) / count)
