"""Which run a checkpoint and a result belong to, and that no other one goes on from them or overwrites them."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from tasks import ignored
from tasks.command import refusals
from tasks.files import refuse_file
from tasks.identity import defaults, first_difference
from xsam_hf.trainer.checkpoint import last_whole_checkpoint


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
        parts = {} if self.checkpoint is None else _digests(self.checkpoint)
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
    checkpoint = resume_point(args.resume_from_checkpoint, folder)
    if checkpoint is not None:
        check_parts(checkpoint, args, scaled=trainer.accelerator.scaler is not None)
        compare(whole, identity_of_checkpoint(checkpoint), f"`resume_from_checkpoint` {checkpoint} belongs to", args)
        check_contents(checkpoint, trainer)
        check_digests(checkpoint)
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
    trainer.save_model()
    trainer.save_state()


def resume_point(flag: str | bool | None, folder: Path) -> Path | None:
    """
    The checkpoint that a flag's text means: `true` is the last whole one in a folder, `false` none, anything else a path.

    Raises:
        `ValueError`: there is none.
    """
    text = str(flag).lower()
    if text in ("none", "false"):
        return None
    if text == "true":
        return Path(last_whole_checkpoint(folder))
    if not Path(str(flag)).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {flag}, which is no folder: give a checkpoint, or `true` for the last one in `output_dir`."
        )
    return Path(str(flag))


def check_parts(checkpoint: Path, args: TrainingArguments, scaled: bool = False) -> None:
    """
    Refuses a checkpoint that the Trainer would go on from without saying what is missing.

    Args:
        checkpoint (`Path`): the folder.
        args: tell how many processes there are, and whether they hold shards.
        scaled (`bool`): whether a GradScaler is at work, whose scale is a part too.

    Raises:
        `ValueError`: model, optimizer, schedule, random state or trainer state is missing, cut off or another kind of file.
    """
    ranks = ("rng_state.pth",) if args.world_size == 1 else tuple(f"rng_state_{i}.pth" for i in range(args.world_size))
    sharded = bool(args.fsdp)
    parts = [
        (
            "model.safetensors",
            "model.safetensors.index.json",
            "adapter_model.safetensors",
            *["pytorch_model_fsdp_0"] * sharded,
        ),
        ("optimizer.pt", *["optimizer_0"] * sharded),
        ("scheduler.pt",),
        *[("scaler.pt",)] * scaled,
        *((name,) for name in ranks),
        ("trainer_state.json",),
    ]
    for names in parts:
        there = [checkpoint / name for name in names if (checkpoint / name).exists()]
        if not there:
            raise ValueError(
                f"`resume_from_checkpoint` {checkpoint} has no {names[0]}: resume from a whole checkpoint, or start anew in another "
                "`output_dir`."
            )
        if not _is_readable(there[0]):
            raise ValueError(
                f"{there[0]} is cut off, damaged or another kind of file: resume from an earlier checkpoint, or start anew in "
                "another `output_dir`."
            )


def check_contents(checkpoint: Path, trainer: Trainer) -> None:
    """
    Refuses a checkpoint from which the Trainer would go on at another step, or with random weights in place of missing ones.

    Raises:
        `ValueError`: its step is not that of its folder, or beyond the run's end; or it lacks a trained weight.
    """
    step = json.loads((checkpoint / "trainer_state.json").read_bytes()).get("global_step")
    number = checkpoint.name.removeprefix("checkpoint-")
    if type(step) is not int or step < 1 or (number.isdecimal() and step != int(number)):
        raise ValueError(
            f"{checkpoint / 'trainer_state.json'} says update {step}, which is not its folder's: resume from another checkpoint, or "
            "start anew in another `output_dir`."
        )
    if 0 < trainer.args.max_steps < step:
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint} is of update {step}, and `max_steps` is {trainer.args.max_steps}."
        )
    file = checkpoint / "model.safetensors"
    if not file.is_file():
        return  # in several files, or in shards
    with safe_open(file, framework="pt") as stored:
        kept = set(stored.keys())
    names: dict[int, set[str]] = {}  # a tied weight is stored once
    for name, weight in trainer.model.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            names.setdefault(id(weight), set()).add(name)
    missing = sorted(min(group) for group in names.values() if not group & kept)
    if missing:
        raise ValueError(
            f"{file} lacks {missing[0]}, and {len(missing)} of {len(names)} weights: resume from a whole checkpoint, or start anew in "
            "another `output_dir`."
        )


def check_digests(checkpoint: Path) -> None:
    """
    Refuses parts that are there, but not as they were saved together: another checkpoint's, or changed since.

    Raises:
        `ValueError`: so it is.
    """
    saved, found = _of_checkpoint(checkpoint, "parts") or {}, _digests(checkpoint)
    for name, digits in saved.items():
        if name in found and found[name] != digits:
            raise ValueError(
                f"{checkpoint / name} is not the one that was saved in this checkpoint: resume from another checkpoint, or start anew in "
                "another `output_dir`."
            )


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the files with tensors, by name; of those that other processes write at the same time, none."""
    digests = {}
    for file in sorted(checkpoint.glob("*")):
        if file.suffix in (".safetensors", ".pt", ".pth") and not file.name.startswith("rng_state_"):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            digests[file.name] = digest.hexdigest()
    return digests


def _is_readable(file: Path) -> bool:
    """Whether a file's table of contents is whole, and its content as far as there are checksums, which `.pt` and `.pth` have."""
    try:
        if file.suffix == ".json":
            return isinstance(json.loads(file.read_bytes()), dict)
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return True
        if file.is_dir():
            return True
        with zipfile.ZipFile(file) as parts:
            return parts.testzip() is None
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def identity_of_checkpoint(checkpoint: Path) -> dict | None:
    return _of_checkpoint(checkpoint, "whole")


def _of_checkpoint(checkpoint: Path, name: str) -> dict | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        return state["stateful_callbacks"]["RunIdentity"]["attributes"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        if checkpoint.name.removeprefix("checkpoint-").isdecimal() and _is_readable(checkpoint / "trainer_state.json"):
            compare(
                whole, identity_of_checkpoint(checkpoint), f"`output_dir` {folder} holds {checkpoint.name} of", args
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
