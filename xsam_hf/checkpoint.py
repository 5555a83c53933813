"""Checkpoints: which one is whole, and the tensors that some methods remember between updates, for any number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging


logger = logging.get_logger(__name__)

FILE = "xsam_state.safetensors"


def last_whole_checkpoint(folder: Path) -> str:
    """
    The last checkpoint that was written to its end, which is where the Trainer writes `trainer_state.json`.

    `get_last_checkpoint` takes the highest number, also of a folder whose writing a kill or a full disk cut off.

    Raises:
        `ValueError`: there is none.
    """
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):  # not there, a folder, not JSON, not UTF-8
            logger.warning(f"Passing over {checkpoint}: its last file, {TRAINER_STATE_NAME}, is missing or cut off.")
    raise ValueError(f"No valid checkpoint found in output directory ({folder}): none was written to its end.")


def save_tensors(tensors: dict[str, list[Tensor]], folder: Path, write: bool) -> None:
    """
    Writes `XSAMState.tensors` to `xsam_state.safetensors`; nothing if there are none.

    Args:
        tensors (`dict[str, list[torch.Tensor]]`): the shards of a sharded one are put together, on all processes at once.
        folder (`Path`): the checkpoint.
        write (`bool`): whether this process writes.
    """
    whole = {
        f"{kind}.{i}": (part.full_tensor() if isinstance(part, DTensor) else part).cpu().contiguous()
        for kind, parts in tensors.items()
        for i, part in enumerate(parts)
    }
    if whole and write:
        save_file(whole, folder / FILE)


def load_tensors(folder: Path, weights: Sequence[Tensor], kinds: Sequence[str] = ()) -> dict[str, list[Tensor]]:
    """
    Reads them back, each to the device of the weight that it belongs to, and sharded like it.

    Args:
        folder (`Path`): the checkpoint.
        weights (`Sequence[torch.Tensor]`): those that are perturbed.
        kinds (`Sequence[str]`): what must be there.

    Raises:
        `ValueError`: the file is missing although it should be there, is damaged, or belongs to other weights.
    """
    try:
        whole = load_file(folder / FILE) if (folder / FILE).is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"{folder / FILE} is damaged ({error}): resume from another checkpoint.") from error
    missing = [kind for kind in kinds if f"{kind}.0" not in whole]
    if missing:
        raise ValueError(
            f"{folder / FILE} is missing or lacks {', '.join(missing)}, which the run had remembered: resume from another checkpoint."
        )
    tensors: dict[str, list[Tensor]] = {}
    for key in sorted(whole, key=lambda key: (key.split(".")[0], int(key.split(".")[1]))):
        kind, i = key.split(".")
        part = whole[key].to(weights[0].device)
        if part.ndim > 0 or kind != "turn":
            weight = weights[int(i)] if int(i) < len(weights) else None
            if weight is None or weight.shape != part.shape:
                raise ValueError(
                    f"{folder / FILE} belongs to other weights than those that are perturbed now: resume with the model and the "
                    "`rho_exclude` of the run that wrote it, or delete the file to begin its averages anew."
                )
            part = part.to(weight.device)
            if isinstance(weight, DTensor):
                part = distribute_tensor(part, weight.device_mesh, weight.placements)
        tensors.setdefault(kind, []).append(part)
    return tensors
