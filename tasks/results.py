"""What every task leaves behind: `result.json`, from which each figure can be traced, and what the run cost."""

import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from tasks.files import write_whole
from tasks.methods import name_of
from tasks.runs import RESULT
from tasks.secret import without_secrets


PACKAGES = ("transformers", "accelerate", "datasets", "evaluate", "xsam_hf")


class CostMeter(TrainerCallback, ExportableState):
    """
    Counts the passes over micro-batches, the examples in them, and the seconds of a training, across interruptions.

    A forward pass in train mode counts as a backward pass too if it builds a graph: XSAM's probes do not. The number of examples
    tells passes over a whole batch from those over a part of it (`ascent_fraction`).

    Args:
        model (`torch.nn.Module`, *optional*): the model to watch. Optional only because the Trainer makes a new callback
            without it when it restores one from a checkpoint; the hook goes on counting in the first.
    """

    def __init__(self, model: nn.Module | None = None):
        self.forward = self.backward = self.forward_examples = self.backward_examples = 0
        self.seconds = 0.0
        self._started: float | None = None
        if model is not None:
            model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, inputs: tuple, keywords: dict[str, Any], outputs: Any) -> None:
        if model.training:
            examples = next(len(x) for x in (*inputs, *keywords.values()) if isinstance(x, torch.Tensor))
            self.forward += 1
            self.forward_examples += examples
            if torch.is_grad_enabled():
                self.backward += 1
                self.backward_examples += examples

    @property
    def passes(self) -> dict[str, int]:
        """What was counted, by name."""
        names = ("forward", "backward", "forward_examples", "backward_examples")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict:
        return {"args": {}, "attributes": {**self.passes, "seconds": self.elapsed}}

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, evaluations in between included."""
        return self.seconds + (0 if self._started is None else time.monotonic() - self._started)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get("CostMeter") if state.global_step > 0 else None
        if saved is not None:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        state.stateful_callbacks["CostMeter"] = self.state()
        self._started = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds, self._started = self.elapsed, None


def write_result(trainer: Trainer, meter: CostMeter, arguments: Any, identity: dict, **facts: Any) -> Path:
    """
    Writes `output_dir/result.json`: the facts (task, dataset, model, metrics ...), all arguments, cost, versions, commit.

    Numbers that are not finite are null. If a loss is among them, the run has diverged: the file says so (`diverged`), and so
    does a line on the terminal.

    Args:
        trainer (`Trainer`): after training.
        meter ([`CostMeter`]): that watched it.
        arguments (dataclass): the task's own arguments; the trainer's are added, without secrets.
        identity (`dict`): [`~tasks.identity.identity_of`] of the run.
        facts: `metrics` among them, `{split: {name: value}}` with a `loss` for each split.

    Returns:
        `Path`: the file.
    """
    args = trainer.args
    losses = {split: scores["loss"] for split, scores in facts["metrics"].items()}
    diverged = not all(map(math.isfinite, losses.values()))
    result = {
        **facts,
        "diverged": diverged,
        "method": name_of(args),
        "passes": meter.passes,
        "seconds": round(meter.elapsed, 2),
        "seed": args.seed,
        "device": str(args.device),
        "mixed_precision": args.mixed_precision,  # the environment's too
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
        # torch tells its build too (+cpu, +cu130), which its metadata does not everywhere.
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "git_commit": git_commit(),
        "arguments": without_secrets({**asdict(arguments), **args.to_sanitized_dict()}),
        "identity": identity,
    }
    path = Path(args.output_dir) / RESULT
    write_whole(path, json.dumps(_finite(result), indent=2, default=str, allow_nan=False) + "\n")
    if diverged:
        told = ", ".join(f"{split} {loss}" for split, loss in losses.items())
        print(f"The run diverged, and its scores mean nothing: the final loss is {told}.", file=sys.stderr)
    return path


def _finite(value: Any) -> Any:
    """Nested values with null for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    """The version of an installed package; `None` where it can be imported but nothing says which it is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` if files differ from it; `None` outside a checkout or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
