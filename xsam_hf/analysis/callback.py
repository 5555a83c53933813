"""Sharpness during training, to the Trainer's reporters and to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..arguments import XSAMArguments
from ..trainer.callback import keep_lines_before
from .arc import arc_profile
from .checked import check_count
from .hessian import hessian_spectrum
from .json_numbers import strict
from .sharpness import ascent_sharpness, average_sharpness
from .surface import Surface, batches_of


FILE = "sharpness.jsonl"
MEASURES = ("arc", "ascent", "average", "hessian")


class SharpnessCallback(TrainerCallback):
    """
    Measures the loss surface every so many updates, or at each evaluation: `trainer.add_callback(SharpnessCallback(trainer))`.

    It logs, for TensorBoard, W&B, Trackio and whatever else the trainer reports to: `sharpness/alpha` (α*, if the arc shows one),
    `sharpness/angle` (ψ in radians), `sharpness/sam` (L(θ_1) − L(θ_0)), `sharpness/ascent`, `sharpness/average`, `sharpness/lambda_1`; and what
    they cost so far in passes over the callback's batches, `sharpness/forward_passes` and `sharpness/backward_passes`. The file
    `sharpness.jsonl` in `output_dir` has the arc's curve as well. Training goes on as without it, bit for bit.

    For each of the batches a measurement takes: arc, 2 backward and 21 forward passes; ascent, 5 backward and 1 forward; average, 1 and
    `directions`; hessian, about 21 to 80 products, each as long as two backward passes.

    Args:
        trainer ([`~transformers.Trainer`]): whose model and loss are looked at, and which the callback is added to.
        every (`int`, *optional*): updates between two measurements. Default: each evaluation.
        batches (`int`, *optional*, defaults to 1): how many training batches, always the same.
        measures (sequence of `str`, *optional*): of `MEASURES`.
        rho (`float`, *optional*): of the arc and the ascent; the trainer's own by default, 0.05 if it has none.
        directions (`int`, *optional*, defaults to 10): of the average, at the radius 0.5, filter-normalised.

    Raises:
        `ValueError`: `every`, `batches`, `directions` or a measure is not one; at the start of training: the callback is another trainer's.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int | None = None,
        batches: int = 1,
        measures: Sequence[str] = ("arc", "ascent"),
        rho: float | None = None,
        directions: int = 10,
    ):
        if unknown := [name for name in measures if name not in MEASURES]:
            raise ValueError(f"There is no measure {unknown[0]!r}: choose among {', '.join(MEASURES)}.")
        for name, count in (
            ("every", 1 if every is None else every),
            ("batches", batches),
            ("directions", directions),
        ):
            check_count(name, count)
        self.trainer, self.every, self.count = trainer, every, batches
        self.measures, self.rho, self.directions = tuple(measures), rho, directions
        self.forwards = self.backwards = 0
        self._batches: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._refuse_other(state)
        self._batches = batches_of(self.trainer, self.count)
        Surface(self.trainer, self._batches)  # refuses what cannot be measured
        if state.is_world_process_zero:
            keep_lines_before(Path(str(args.output_dir)) / FILE, state.global_step and state.global_step + 1)

    def _refuse_other(self, state: TrainerState) -> None:
        if state is not self.trainer.state:
            raise ValueError(
                "This SharpnessCallback was made of another trainer, whose model it would measure: add SharpnessCallback(trainer) of the "
                "trainer that trains."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self.measure(args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.every is None and self._batches:
            self.measure(args, state)

    def measure(self, args: TrainingArguments, state: TrainerState) -> None:
        """Measures, logs and writes one line."""
        self._refuse_other(state)
        rho = self.rho or XSAMArguments.of(args).rho or XSAMArguments().rho
        surface, noisy = Surface(self.trainer, self._batches), Surface(self.trainer, self._batches, training=True)
        found: dict[str, float] = {}
        line: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, "rho": rho}
        if "arc" in self.measures:
            profile = arc_profile(noisy, XSAMArguments(rho=rho))
            (search,) = profile.searches
            found |= {"sharpness/sam": profile.last_loss - profile.loss, "sharpness/angle": search.angle}
            if search.alpha is not None:
                found["sharpness/alpha"] = search.alpha
            line["arc"] = asdict(profile)
        if "ascent" in self.measures:
            found["sharpness/ascent"] = ascent_sharpness(surface, rho)
        if "average" in self.measures:
            found["sharpness/average"] = float(average_sharpness(surface, [0.5], self.directions).mean[0])
        if "hessian" in self.measures:
            found["sharpness/lambda_1"] = hessian_spectrum(surface, count=1, trace_products=0).eigenvalues[0]
        self.forwards += surface.forwards + noisy.forwards
        self.backwards += surface.backwards + noisy.backwards
        found = {name: value for name, value in found.items() if np.isfinite(value)}
        found |= {"sharpness/forward_passes": self.forwards, "sharpness/backward_passes": self.backwards}
        if state.is_world_process_zero:
            with open(Path(str(args.output_dir)) / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(strict({**line, **found}), allow_nan=False) + "\n")
        due = self.trainer.control.should_log
        self.trainer.log(found)
        self.trainer.control.should_log = due  # a log of ours is not the update's own, which is still to come
