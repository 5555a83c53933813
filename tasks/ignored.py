"""Arguments that would be passed over: those that the chosen optimizer or schedule never reads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import logging

from tasks.command import cut, refusals, sentence


logger = logging.get_logger(__name__)

_YES_NO = ("true", "1", "yes", "false", "0", "no")
_OF_SOME_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")


def check(trainer: Trainer) -> None:
    """
    Refuses what is told to an optimizer or a schedule that does not take it, and warns of fields that nothing reads: a recipe may have
    them for other runs.

    Raises:
        `ValueError`: `optim_args` or `lr_scheduler_kwargs` hold something that is not taken.
    """
    args = trainer.args
    _refuse_optim_args(trainer)
    _refuse_scheduler_kwargs(args)
    # Those of the method are the library's: xsam_hf/unread.py.
    warn(args, (*_of_optimizer(trainer), *_of_schedule(args)))
    if args.rho and args.ascent_steps == 1 and args.direction in ("lsam", "msam"):
        logger.warning(f"With one ascent step `direction` {args.direction} is SAM: give `ascent_steps` 2 or more.")


def warn(args: Any, found: Iterable[tuple[str, str]]) -> None:
    """Warns of fields, each given with the one whose value does not read it."""
    for name, field in found:
        logger.warning(
            f"`{name}` is {getattr(args, name)}, and `{field}` {_text(getattr(args, field))} does not read it."
        )


def _refuse_optim_args(trainer: Trainer) -> None:
    """
    Refuses what transformers would pass over: it takes from `optim_args` what the optimizer's branch asks for, and drops the rest.

    Raises:
        `ValueError`: a name is not among what one of torch's optimizers is made with, or its value is another there.
    """
    args = trainer.args
    if not args.optim_args:
        return
    parts = args.optim_args.replace(" ", "").split(",")
    if bad := [part for part in parts if part.count("=") != 1 or not all(part.split("="))]:
        raise ValueError(f"`optim_args` is {args.optim_args}, of which {bad[0]!r} is not of the form name=value.")
    try:
        cls, taken = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    except Exception as error:  # of the optimizers' branches
        raise ValueError(
            f"`optim` {_text(args.optim)} with `optim_args` {args.optim_args}: {sentence(error)}."
        ) from error
    if not getattr(cls, "__module__", "").startswith("torch.optim"):
        return  # others rename what they are given
    for part in parts:
        name, _, value = part.partition("=")
        found = taken.get(name)
        if isinstance(found, bool):
            heard = value.lower() in _YES_NO  # other words are no to transformers
        else:  # the groups of weights have a decay of their own
            heard = found is not None and found == _number(value) and name != "weight_decay"
        if not heard:
            raise ValueError(
                f"`optim_args` is {args.optim_args}, of which {_text(args.optim)} does not take {part}: leave it out, or give it as a "
                "flag of its own if there is one."
            )


def _refuse_scheduler_kwargs(args: TrainingArguments) -> None:
    """
    Makes the schedule once, for a weight of its own.

    Raises:
        `ValueError`: the schedule takes no such name or value, or none at all.
    """
    if not args.lr_scheduler_kwargs:
        return
    told = f"`lr_scheduler_kwargs` is {cut(str(args.lr_scheduler_kwargs))}, "
    try:
        _schedule(args, args.lr_scheduler_kwargs)
    except Exception as error:  # of the schedules, which check little
        raise ValueError(
            f"{told}and `lr_scheduler_type` {_text(args.lr_scheduler_type)} does not take it ({sentence(error)}): leave it out, or "
            "give names and numbers that it takes."
        ) from error
    try:
        _schedule(args, {"no such name": None})
    except TypeError:
        return
    raise ValueError(f"{told}and `lr_scheduler_type` {_text(args.lr_scheduler_type)} reads none: leave it out.")


def _schedule(args: TrainingArguments, kwargs: dict[str, Any]) -> Any:
    groups = [{"params": [torch.zeros(1)]} for _ in range(2)]  # as many as the Trainer makes
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate)
    return get_scheduler(args.lr_scheduler_type, optimizer, 0, 1000, dict(kwargs))


def _of_schedule(args: TrainingArguments) -> Iterator[tuple[str, str]]:
    if args.warmup_steps and args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy"):
        yield "warmup_steps", "lr_scheduler_type"


def _of_optimizer(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """The fields without which the optimizer would be told the same."""

    def told(args: TrainingArguments) -> str:
        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        return str((cls, {name: value for name, value in kwargs.items() if isinstance(value, int | float | tuple)}))

    known = {field.name: field.default for field in fields(trainer.args)}
    for name in _OF_SOME_OPTIMIZERS:
        if getattr(trainer.args, name) != known[name]:
            other = copy.copy(trainer.args)
            setattr(other, name, known[name])
            with refusals():
                if told(other) == told(trainer.args):
                    yield name, "optim"


def _text(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enumeration


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
