"""The arguments that all tasks have, and the ranges of the Trainer's that transformers does not check."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.integrations import is_deepspeed_available


@dataclass
class TaskArguments:
    """What every task can be told beside the Trainer's arguments."""

    dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the model. Default: the task's, or a saved model's own."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's choice."})

    def __post_init__(self):
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}: give a probability from 0 to below 1.")
        most = os.cpu_count() or 1
        if self.threads is not None and not 1 <= self.threads <= most:
            raise ValueError(
                f"`threads` is {self.threads}: give 1 to {most}, as many as there are processors, or leave it out for torch's "
                "choice."
            )

    def use_threads(self) -> None:
        """Sets torch's number of threads, if one was given."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


# Field, what is allowed, and what to give instead. Values that transformers would ignore, or end on in the middle of a run.
_RANGES: list[tuple[str, Any, str]] = [
    ("per_device_train_batch_size", lambda v: v >= 1, "1 or more"),
    ("per_device_eval_batch_size", lambda v: v >= 1, "1 or more"),
    ("gradient_accumulation_steps", lambda v: v >= 1, "1 or more"),
    ("num_train_epochs", lambda v: v > 0, "a number above 0"),
    ("max_steps", lambda v: v >= 1 or v == -1, "1 or more, or leave it out to count epochs"),
    ("learning_rate", lambda v: v >= 0, "0 or more"),
    ("weight_decay", lambda v: v >= 0, "0 or more"),
    ("adam_beta1", lambda v: 0 <= v < 1, "a share from 0 to below 1"),
    ("adam_beta2", lambda v: 0 <= v < 1, "a share from 0 to below 1"),
    ("adam_epsilon", lambda v: v >= 0, "0 or more"),
    ("max_grad_norm", lambda v: v >= 0, "a norm above 0, or 0 to leave gradients as they are"),
    ("label_smoothing_factor", lambda v: 0 <= v < 1, "a share from 0 to below 1"),
    ("warmup_steps", lambda v: 0 <= v < 1 or v == int(v) > 0, "a whole number of updates, or a share of them below 1"),
    ("logging_steps", lambda v: v > 0, "a number of updates, or a share of them below 1"),
    ("eval_steps", lambda v: v > 0, "a number of updates, or a share of them below 1"),
    ("eval_delay", lambda v: v >= 0, "0 or more"),
    ("save_steps", lambda v: v > 0, "a number of updates, or a share of them below 1"),
    ("save_total_limit", lambda v: v >= 1, "1 or more, or leave it out to keep all checkpoints"),
    ("dataloader_num_workers", lambda v: v >= 0, "0 or more"),
    ("seed", lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
    ("data_seed", lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
]


def check_ranges(args: Any) -> None:
    """
    Looks at the fields of training arguments, as far as there are such.

    Raises:
        `ValueError`: a value is out of range; the message names the field, the value and the way out.
    """
    for name, allowed, way_out in _RANGES:
        value = getattr(args, name, None)
        if value is not None and not allowed(value):
            raise ValueError(f"`{name}` is {value}: give {way_out}.")


@dataclass
class CheckedArguments:
    """
    Mixed into a task's training arguments.

    Raises:
        `ValueError`: a value is out of range; the message names the field, the value and the way out.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything is written. Default: runs/TASK/RECIPE/METHOD/seed-SEED."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log. They are what it should show."},
    )
    do_train: bool = field(default=True, metadata={"help": "Train, which is always done."})
    do_eval: bool = field(default=True, metadata={"help": "Score on the validation split, which is always done."})
    do_predict: bool = field(default=True, metadata={"help": "Score on the test split, which is always done."})

    def __post_init__(self):
        check_ranges(self)
        if getattr(self, "deepspeed", None) is not None and not is_deepspeed_available():
            raise ValueError(
                f"`deepspeed` is {self.deepspeed}, and the package is not installed: pip install deepspeed, or leave it out."
            )
        for name in ("do_train", "do_eval", "do_predict"):
            if not getattr(self, name):
                raise ValueError(
                    f"`{name}` is False, but this script always trains and scores all splits: leave it out."
                )
        for name in ("prediction_loss_only", "batch_eval_metrics", "label_names"):
            if getattr(self, name, None):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but the scores need all predictions: leave it out."
                )
        if not getattr(self, "eval_do_concat_batches", True):
            raise ValueError("`eval_do_concat_batches` is False, but the scores need all predictions: leave it out.")
        if self.output_dir is None:
            self.output_dir = "runs"  # `recipes.parse` knows better
        super().__post_init__()
        if "num_steps" in (self.accelerator_config.gradient_accumulation_kwargs or {}):
            raise ValueError("`accelerator_config` has num_steps: give `gradient_accumulation_steps` instead.")
