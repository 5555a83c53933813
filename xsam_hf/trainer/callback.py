"""What XSAM remembers between updates: α and its search schedule in every checkpoint, the searches in a file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..arguments import XSAMArguments
from ..schedule import refuse_never_on, search_at
from ..search import AlphaSearch
from ..state import XSAMState


SEARCH_FILE = "xsam_search.jsonl"


class XSAMCallback(TrainerCallback, ExportableState):
    """
    Keeps [`XSAMState`] in `trainer_state.json`, says when α is searched, and writes every search to `xsam_search.jsonl`.

    [`XSAMMixin`] adds it by itself. It reads its state back at the beginning of training whatever
    `restore_callback_states_from_checkpoint` says: a resumed run equals the uninterrupted one.

    Attributes:
        began (`int`): the number of updates before this training.
        averages (`int`, *optional*): how many tensors the checkpoint that was resumed has in `xsam_state.safetensors`, if it says so.
        step_due (`bool`): an update's gradient is there, and the optimizer has not stepped yet.
    """

    def __init__(self):
        self.xsam = XSAMState()
        self.began = 0
        self.averages: int | None = 0
        self.step_due = False
        self._epoch_began = False
        self._resumed_inside_epoch = False
        self._scheduled: int | None = None

    def state(self) -> dict:
        # Tensors go into a file of their own: see checkpoint.py.
        apart = ("average", "memory")
        numbers = {f.name: getattr(self.xsam, f.name) for f in dataclasses.fields(XSAMState) if f.name not in apart}
        return {"args": {}, "attributes": {"xsam": numbers, "averages": len(self.xsam.average)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if (arguments := XSAMArguments.of(args)).rho > 0:
            refuse_never_on(arguments, state.max_steps)
        self._scheduled, self.step_due, self._epoch_began = None, False, False
        self.began, name = state.global_step, type(self).__name__
        states: Any = state.stateful_callbacks
        saved = states.get(name) if state.global_step > 0 else None
        self.averages = 0
        if saved is None:  # a new run, or one that a plain Trainer began
            if state.global_step > 0 and any(key.startswith("xsam/") for entry in state.log_history for key in entry):
                raise ValueError(
                    f"The checkpoint of update {state.global_step} was written by XSAM, and its trainer_state.json lacks XSAM's own "
                    "state, α among it: resume from another checkpoint."
                )
            self.xsam = XSAMState()
            self._resumed_inside_epoch = False
        else:
            self.xsam, self.averages = _state_in(saved, state.global_step)
            self._resumed_inside_epoch = state.epoch is not None and state.epoch % 1 != 0
        states[name] = self.state()  # the Trainer saves only what is listed here
        if state.is_world_process_zero:
            keep_lines_before(Path(str(args.output_dir)) / SEARCH_FILE, state.global_step)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # Also called when a run resumes inside an epoch, whose search the saved state has behind it.
        self._epoch_began, self._resumed_inside_epoch = not self._resumed_inside_epoch, False

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.step_due = False

    def schedule_search(self, arguments: XSAMArguments, state: TrainerState) -> None:
        """Marks the coming update for a search if the schedule asks for one; once for all of its micro-batches."""
        if state.global_step == self._scheduled:
            return
        self._scheduled = self.xsam.updates = state.global_step  # the Trainer's is the only clock
        if arguments.searches and arguments.alpha_search_steps is None:
            self.xsam.search_due |= self._epoch_began
        elif arguments.searches:
            self.xsam.search_due |= search_at(arguments, state.global_step, state.max_steps)
        self._epoch_began = False

    def record_search(self, args: TrainingArguments, state: TrainerState, search: AlphaSearch) -> None:
        """Appends one JSON line: `step` and `epoch` before the update, the grid, its losses (null: not finite), α after it."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "epoch": state.epoch, **dataclasses.asdict(search)}
        line["alpha"] = self.xsam.alpha
        line["losses"] = [loss if math.isfinite(loss) else None for loss in search.losses]
        line["angle"] = search.angle if math.isfinite(search.angle) else None
        with open(Path(str(args.output_dir)) / SEARCH_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _state_in(saved: Any, step: int) -> tuple[XSAMState, int | None]:
    """
    What a checkpoint keeps of XSAM's: the state, without its averages, and how many of these there are.

    Raises:
        `ValueError`: something is missing, unknown, or of another kind.
    """
    where = f"The checkpoint of update {step}"
    known = {f.name for f in dataclasses.fields(XSAMState)} - {"average", "memory"}
    attributes = saved.get("attributes", {}) if isinstance(saved, dict) else None
    numbers = attributes.get("xsam", {}) if isinstance(attributes, dict) else None
    if not (isinstance(attributes, dict) and isinstance(numbers, dict)):
        raise ValueError(f"{where} has a damaged trainer_state.json: resume from another checkpoint.")
    if missing := known - numbers.keys():
        raise ValueError(
            f"{where} lacks {', '.join(sorted(missing))} of XSAM's own state in its trainer_state.json: resume from another checkpoint."
        )
    if unknown := numbers.keys() - known:
        raise ValueError(
            f"{where} has {', '.join(sorted(unknown))} in XSAM's own state, which another version has written: resume with that one."
        )
    try:
        kept = XSAMState(**numbers)
    except ValueError as error:
        raise ValueError(
            f"{where} has a damaged trainer_state.json ({error}): resume from another checkpoint."
        ) from error
    averages = attributes.get("averages")
    if averages is not None and type(averages) is not int:
        raise ValueError(
            f"{where} counts {averages!r} averages in its trainer_state.json: resume from another checkpoint."
        )
    return kept, averages


def keep_lines_before(path: Path, step: int) -> None:
    """Drops the searches that a killed run made after its last checkpoint (or all, for a new run): they will come again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if step > 0 and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                earlier = json.loads(line)["step"] < step
            except (ValueError, LookupError, TypeError):  # the write that a kill cut off, or damage
                continue
            if earlier:
                kept.append(line)
    whole = path.with_suffix(".tmp")  # a kill or a full disk must not cost the earlier searches
    whole.write_text("".join(kept), encoding="utf-8")
    whole.replace(path)
