"""What the paper's runs cost: their passes by their arguments, and hours by a few passes that are timed on the machine at hand."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.paper import SETTINGS, Setting
from scripts.run_seeds import ROOT, Run, is_finished
from tasks import recipes


@dataclass(frozen=True)
class Cost:
    """Of one run: updates, passes forward and backward over an update's batch, and those forward alone of searches and evaluations."""

    updates: int
    passes: float
    searches: float
    evaluations: float

    def hours(self, pace: tuple[float, float]) -> float:
        """With the seconds of a pass over a batch, forward and backward and forward alone."""
        both, forward = pace
        return (self.passes * both + (self.searches + self.evaluations) * forward) / 3600


def cost(setting: Setting, args: Any, task: Any, processes: int = 1, test: int = 10_000) -> Cost:
    """
    What a run does, by its arguments.

    Args:
        setting ([`Setting`]): the number of its examples.
        args, task: the Trainer's and the task's arguments of the run.
        processes (`int`, *optional*, defaults to 1): that share an update's batch.
        test (`int`, *optional*, defaults to 10,000): images that every evaluation scores.
    """
    examples = getattr(task, "train_examples", None) or setting.examples
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    epoch = math.ceil((setting.updates or setting.examples / batch) * examples / setting.examples)
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    if args.rho == 0:
        return Cost(updates, updates, 0, _evaluations(args, task, test, updates / epoch, batch))
    every = args.alpha_search_steps
    searches = 0.0
    if args.alpha is None and args.direction == "arc":
        searches = math.ceil(updates / (epoch if every is None else every if every >= 1 else every * updates))
    forward = searches * args.alpha_samples + (updates if args.gradient_scale == "slope_max" else 0)
    passes = updates * (args.ascent_steps + 1)
    return Cost(updates, passes, forward, _evaluations(args, task, test, updates / epoch, batch))


def _evaluations(args: Any, task: Any, test: int, epochs: float, batch: int) -> float:
    if args.eval_strategy.value != "epoch" or not hasattr(task, "test_examples"):
        return 0
    return epochs * (task.test_examples or test) / batch


def pace(task: Any, args: Any, examples: int = 8) -> tuple[float, float]:
    """
    Seconds of a pass over an update's batch on this machine, forward and backward and forward alone, in float32: of a few examples on a
    CPU, of a whole batch on a GPU, after a pass to warm up.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.per_device_train_batch_size
    size = batch if device.type == "cuda" else min(batch, examples)
    whole = batch * args.gradient_accumulation_steps
    if hasattr(task, "max_tokens"):
        from tasks.translation.model import build as translation

        length = 32
        size = max(1, (task.max_tokens if device.type == "cuda" else 8 * length) // length)
        whole = task.max_tokens / length
        model: Any = translation(task.model, 8848, 6632)  # the two vocabularies of IWSLT14 with fairseq's merges
        tokens = torch.randint(4, 6000, (size, length), device=device)
        inputs = {"input_ids": tokens, "labels": tokens.clone(), "decoder_input_ids": tokens, "use_cache": False}
    else:
        from tasks.image_classification import models
        from tasks.image_classification.catalogue import DATASETS

        images = DATASETS[task.dataset]
        model = models.build(task.model, task.dataset)
        shape = (size, images.channels, images.size, images.size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        inputs = {"pixel_values": pixels, "labels": torch.randint(0, images.classes, (size,), device=device)}
    model.to(device).train()

    def seconds(grad: bool) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            with torch.set_grad_enabled(grad):
                loss = model(**inputs).loss
            if grad:
                loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - started)
        return min(times[1:])

    return tuple(seconds(grad) * whole / size for grad in (True, False))  # type: ignore[return-value]


def parsed(of: Run) -> tuple[Any, Any]:
    """
    The task's and the Trainer's arguments of a run, as its command will read them.

    Raises:
        `ValueError`: the command would refuse them.
    """
    if of.task == "translation":
        from tasks.translation.train import TrainingArguments, TranslationArguments

        classes: tuple[type, type] = (TranslationArguments, TrainingArguments)
    else:
        from tasks.image_classification.train import ImageArguments
        from tasks.image_classification.train import TrainingArguments as ImageTrainingArguments

        classes = (ImageArguments, ImageTrainingArguments)
    with contextlib.redirect_stderr(io.StringIO()):  # what the method stands for is in its name
        task, args = recipes.parse(classes, [str(ROOT / of.recipe_file), *of.command[3:]], "")
    return task, args


def plan(runs: Sequence[Run], processes: int = 1) -> str:
    """The commands of the runs that are not finished, with their passes and hours, and the hours of all; one of `processes` is timed."""
    paces: dict[tuple, tuple[float, float]] = {}
    lines, total = [], 0.0
    settings = {f"paper-{name}": of for name, of in SETTINGS.items()}
    for of in runs:
        if is_finished(of):
            continue
        task, args = parsed(of)
        key = (of.task, task.model, getattr(task, "dataset", None), args.per_device_train_batch_size)
        if key not in paces:
            paces[key] = pace(task, args)
        setting = next(
            s for name, s in settings.items() if re.fullmatch(rf"{name}(-examples-.*|-epochs-.*)?", of.group)
        )
        needed = cost(setting, args, task, processes)
        hours = needed.hours(paces[key])
        total += hours
        lines.append(f"python {shlex.join(of.command)}")
        lines.append(
            f"    # {needed.updates:,} updates, {needed.passes:,.0f} passes forward and backward, "
            f"{needed.searches + needed.evaluations:,.0f} forward alone; {_hours(hours)}"
        )
    import torch

    where = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {torch.get_num_threads()} threads"
    )
    lines.append(f"{len(lines) // 2} runs to make, {_hours(total)} one after the other on {where}, in float32.")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{3600 * hours:.0f} seconds" if hours < 1 / 30 else f"{hours:,.1f} hours"
