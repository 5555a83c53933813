"""Whether a checkpoint is whole: its parts, what they hold, and whose it is."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments

from xsam_hf.trainer.checkpoint import last_whole_checkpoint


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
        if not is_readable(there[0]):
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
    saved, found = _of_checkpoint(checkpoint, "parts") or {}, digests(checkpoint)
    for name, digits in saved.items():
        if name in found and found[name] != digits:
            raise ValueError(
                f"{checkpoint / name} is not the one that was saved in this checkpoint: resume from another checkpoint, or start anew in "
                "another `output_dir`."
            )


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint with the best model so far, if one is told and there."""
    best = json.loads((checkpoint / "trainer_state.json").read_bytes()).get("best_model_checkpoint")
    return Path(best) if isinstance(best, str) and Path(best).is_dir() else None


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the files with tensors, by name; of those that other processes write at the same time, none."""
    found = {}
    for file in sorted(checkpoint.glob("*")):
        if file.suffix in (".safetensors", ".pt", ".pth") and not file.name.startswith("rng_state_"):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            found[file.name] = digest.hexdigest()
    return found


def is_readable(file: Path) -> bool:
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


def identity_of(checkpoint: Path) -> dict | None:
    return _of_checkpoint(checkpoint, "whole")


def _of_checkpoint(checkpoint: Path, name: str) -> dict | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        return state["stateful_callbacks"]["RunIdentity"]["attributes"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
