"""Checkpoints: which one is whole, when one may be written, and the averages that some methods remember, for any number of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..state import XSAMState
from .callback import XSAMCallback


logger = logging.get_logger(__name__)

FILE = "xsam_state.safetensors"

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class CheckpointMixin(_Trainer):
    """Checkpoints that are whole, or are not taken for one; and XSAM's averages in them."""

    _xsam_checkpoint: str | None = None

    @property
    def _xsam_callback(self) -> XSAMCallback:
        """Looked up each time: `restore_callback_states_from_checkpoint` replaces callbacks. Added where there is none."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, XSAMCallback):
                return callback
        self.add_callback(added := XSAMCallback())
        if self.is_in_train:  # `rho` was 0 so far
            added.on_train_begin(self.args, self.state, self.control)
        return added

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(str(self.args.output_dir)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        callback = next((c for c in self.callback_handler.callbacks if isinstance(c, XSAMCallback)), None)
        if callback is not None and callback.step_due:
            self._xsam_save_after_the_step()
            return
        if self.args.should_save:  # a folder that is written anew is not whole until it has its new trainer_state.json
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _xsam_save_after_the_step(self) -> None:
        """
        Puts off a checkpoint that is asked for between an update's gradient and the optimizer's step.

        `enable_jit_checkpoint` does so in `on_pre_optimizer_step`. α and averages are then those after the update, weights
        those before it: a run that resumes there would make the update a second time, from another α. `on_step_end` comes next.
        """
        for callback in self.callback_handler.callbacks:
            manager = getattr(callback, "jit_manager", None)
            if manager is not None:
                manager.is_checkpoint_requested = True
                return
        raise RuntimeError(
            "A checkpoint between an update's gradient and the optimizer's step would not resume exactly: save it in `on_step_end`."
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Process 0 writes trainer_state.json next. Without the other processes' numbers a resumed run would differ.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        states = [callback.xsam for callback in self.callback_handler.callbacks if isinstance(callback, XSAMCallback)]
        state = states[0] if states else XSAMState()
        about = {"update": str(self.state.global_step), "perturbation": str(state.average_of)}
        save_average(state.average, Path(output_dir), self.args.should_save, about)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # Read by the first training step: the callback that is to have the averages may be replaced until then.
        self._xsam_checkpoint = checkpoint

    def _xsam_read_average(self, weights: Mapping[str, Tensor]) -> None:
        if self._xsam_checkpoint is not None:
            callback = self._xsam_callback
            about = {"update": str(callback.began), "perturbation": str(callback.xsam.average_of)}
            callback.xsam.average = load_average(Path(self._xsam_checkpoint), weights, callback.averages, about)
            self._xsam_checkpoint = None


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


def save_average(
    average: Mapping[str, Tensor], folder: Path, write: bool, about: Mapping[str, str] | None = None
) -> None:
    """
    Writes `XSAMState.average` to `xsam_state.safetensors`, by the weights' names; if there is none, no such file stays.

    Args:
        average (`Mapping[str, torch.Tensor]`): the shards of a sharded one are put together, on all processes at once.
        folder (`Path`): the checkpoint.
        write (`bool`): whether this process writes; the others keep no whole tensor.
        about (`Mapping[str, str]`, *optional*): the update and the perturbation, for [`load_average`] to compare.
    """
    whole = {}
    for name, part in average.items():
        tensor = part.full_tensor() if isinstance(part, DTensor) else part
        if write:
            whole[name] = tensor.cpu().contiguous()
    if whole:
        save_file(whole, folder / FILE, dict(about or {}))
    elif write:
        (folder / FILE).unlink(missing_ok=True)  # of an earlier run with another method or schedule


def load_average(
    folder: Path, weights: Mapping[str, Tensor], wanted: int | None = None, about: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """
    Reads it back, each tensor to the device of the weight that it belongs to, and sharded like it.

    Args:
        folder (`Path`): the checkpoint.
        weights (`Mapping[str, torch.Tensor]`): by name, also those that are frozen for now.
        wanted (`int`, *optional*): how many tensors must be there; not compared by default.
        about (`Mapping[str, str]`, *optional*): what the file must say of itself, if it says anything; older ones do not.

    Raises:
        `ValueError`: tensors are missing or too many, the file is damaged or of another update or perturbation, or a tensor belongs to
            no weight or to one of another shape or kind.
    """
    average: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    says: dict[str, str] = {}
    try:
        if (folder / FILE).is_file():
            whole = load_file(folder / FILE)
            with safe_open(folder / FILE, "pt") as file:
                says = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{folder / FILE} is damaged ({error}): resume from another checkpoint.") from error
    if wanted is not None and len(whole) < wanted:
        raise ValueError(
            f"{folder / FILE} is missing or lacks {wanted - len(whole)} of {wanted} averages: resume from another checkpoint."
        )
    if wanted is not None and len(whole) > wanted:
        raise ValueError(
            f"{folder / FILE} has {len(whole)} averages, of which {TRAINER_STATE_NAME} beside it counts {wanted}: it is another run's. "
            "Delete the file if that run is not this one, or resume from another checkpoint."
        )
    for name, value in (about or {}).items():
        if whole and says.get(name, value) != value:
            raise ValueError(
                f"{folder / FILE} says `{name}` {says[name]}, and {TRAINER_STATE_NAME} beside it {value}: resume from another checkpoint."
            )
    for name, tensor in whole.items():
        weight = weights.get(name)
        if weight is None or weight.shape != tensor.shape:
            raise ValueError(
                f"{folder / FILE} belongs to another model, in which {name!r} has the shape {tuple(tensor.shape)}: resume with the "
                "model of the run that wrote it."
            )
        if tensor.dtype.is_complex != weight.dtype.is_complex or not (
            tensor.is_complex() or tensor.is_floating_point()
        ):
            raise ValueError(f"{folder / FILE} has {tensor.dtype} for {name!r}: resume from another checkpoint.")
        if not tensor.isfinite().all():
            raise ValueError(
                f"{folder / FILE} has numbers that are not finite for {name!r}: resume from another checkpoint."
            )
        tensor = tensor.to(weight.device)
        if isinstance(weight, DTensor):
            tensor = distribute_tensor(tensor, weight.device_mesh, weight.placements)
        average[name] = tensor
    return average
