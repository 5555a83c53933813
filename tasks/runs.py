"""Which run a checkpoint and a result belong to, and that no other one goes on from them or overwrites them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from tasks import checkpoints, ignored
from tasks.command import refusals
from tasks.files import refuse_file
from tasks.identity import defaults, first_difference


logger = logging.get_logger(__name__)

RESULT = "result.json"


class RunIdentity(TrainerCallback, ExportableState):
    """
    Writes a run's [`~tasks.identity.identity_of`] into its checkpoints, and a digest of each part that was saved before.

    Args:
        whole (`dict`, *optional*): left out only by the Trainer, when it restores callbacks from a checkpoint.
    """

    def __init__(self, whole: dict | None = None):
        self.whole = whole
        self.training = False
        self.checkpoint: Path | None = None  # after this update

    def state(self) -> dict:
        parts = {} if self.checkpoint is None else checkpoints.digests(self.checkpoint)
        return {"args": {}, "attributes": {"whole": self.whole, "parts": parts}}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_begin(self, args, state, control, **kwargs):
        self.training = True
        self.checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step + 1}"


def check_output(args: TrainingArguments, metrics: Iterable[str]) -> None:
    """
    Refuses what would end a run after its first epoch: a folder that cannot be written to, a best model by no metric of ours.

    Args:
        args: the Trainer's.
        metrics (`Iterable[str]`): what an evaluation measures, without `eval_`.

    Raises:
        `ValueError`: so it is.
    """
    check_folder(args.output_dir)
    for name in ("fp16", "fp16_full_eval"):
        if args.device.type == "cpu" and getattr(args, name):
            raise ValueError(
                f"`{name}` is True, and a CPU would go on in float32 without a word: leave it out, or give bf16."
            )
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError(
            "`load_best_model_at_end` is True, but `eval_strategy` is no, so that no model is known to be the best: set it to epoch."
        )
    best = args.metric_for_best_model
    known = [*metrics, "loss"]
    if best is not None and best.removeprefix("eval_") not in known:
        raise ValueError(f"`metric_for_best_model` is {best}: choose one of {', '.join(dict.fromkeys(known))}.")


def check_folder(output_dir: str) -> None:
    """
    Makes the folder, if there is none.

    Raises:
        `ValueError`: it cannot be written to.
    """
    folder = Path(output_dir)
    try:
        refuse_file(folder, "`output_dir`")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # of this process's own
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` is {folder}, which cannot be written to ({error}): give another.") from error


def start(trainer: Trainer, whole: dict) -> None:
    """
    Trains, from the beginning or from `resume_from_checkpoint` (`true`: the last whole one in `output_dir`), and saves the model.

    Args:
        trainer (`Trainer`): with a [`RunIdentity`] among its callbacks.
        whole (`dict`): the same run's [`~tasks.identity.identity_of`].

    Raises:
        `ValueError`: `output_dir` holds another run, the checkpoint is another run's or lacks a part, or an argument would be ignored.
    """
    args = trainer.args
    folder = Path(args.output_dir)
    checkpoint = checkpoints.resume_point(args.resume_from_checkpoint, folder)
    if checkpoint is not None:
        checkpoints.check_parts(checkpoint, args, scaled=trainer.accelerator.scaler is not None)
        compare(whole, checkpoints.identity_of(checkpoint), f"`resume_from_checkpoint` {checkpoint} belongs to", args)
        checkpoints.check_contents(checkpoint, trainer)
        checkpoints.check_digests(checkpoint)
        if args.load_best_model_at_end and (best := checkpoints.best_of(checkpoint)):
            checkpoints.check_digests(best)
    refuse_other_runs(folder, whole, args)
    ignored.check(trainer)
    if not len(trainer.get_train_dataloader()):
        raise ValueError(
            f"`dataloader_drop_last` is {args.dataloader_drop_last}, and all training examples together do not fill one batch: "
            "leave it out, or lower `per_device_train_batch_size`."
        )
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception:
        # The Trainer makes optimizer and schedule of its arguments here.
        begun = any(isinstance(c, RunIdentity) and c.training for c in trainer.callback_handler.callbacks)
        with nullcontext() if begun else refusals():
            raise
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        logger.warning(
            "`load_best_model_at_end` is True, and no evaluation took place: the last model is kept, and scored."
        )
    trainer.save_model()
    trainer.save_state()


def refuse_other_runs(folder: Path, whole: dict, args: TrainingArguments) -> None:
    """
    Refuses to train where another run has left its result or its checkpoints, which this one would mix up with its own.

    Raises:
        `ValueError`: so it is; the message names the first difference.
    """
    result = folder / RESULT
    if result.exists():
        try:
            found = json.loads(result.read_bytes()).get("identity")
        except (ValueError, AttributeError):
            found = None
        compare(whole, found, f"`output_dir` {folder} holds the {RESULT} of", args)
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        # One that was not written to its end is not resumed either.
        if checkpoint.name.removeprefix("checkpoint-").isdecimal() and checkpoints.is_readable(
            checkpoint / "trainer_state.json"
        ):
            compare(
                whole, checkpoints.identity_of(checkpoint), f"`output_dir` {folder} holds {checkpoint.name} of", args
            )


def compare(ours: dict, theirs: dict | None, where: str, args: TrainingArguments) -> None:
    """
    Refuses another run's leavings.

    Args:
        ours (`dict`): this run's [`~tasks.identity.identity_of`].
        theirs (`dict`, *optional*): the other one's; not given if it is not known.
        where (`str`): begins the sentence.
        args: give the defaults of fields that one of the two does not have, made by another version of transformers.

    Raises:
        `ValueError`: the two differ; the message names the first difference.
    """
    way_out = "Give another `output_dir`, or the arguments of that run."
    if not isinstance(theirs, dict):
        raise ValueError(f"{where} a run that it does not name. {way_out}")
    if found := first_difference(ours, theirs, defaults(args)):
        name, mine, other = found
        raise ValueError(f"{where} another run: its `{name}` is {other}, this one's {mine}. {way_out}")
