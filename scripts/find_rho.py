"""
A range test for `rho` on a recipe's model and data, and its picture, as for a learning rate: how far the loss rises along its gradient.

    scripts/run find_rho tasks/image_classification/recipes/digits-noise-resnet-small.yaml
    scripts/run find_rho tasks/translation/recipes/handbook-small.yaml --epochs 2 --batches 8 --seed 1

Trains with the base optimizer for some epochs first, on the recipe's own schedule. Flags that are not listed here are the recipe's. Writes
`rho.json` and `rho.svg` into `output_dir`. docs/choosing_rho.md says what to do with the figure, and how often it was wrong.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from transformers import TrainerCallback

from scripts.run_flags import fields
from scripts.run_seeds import ROOT
from tasks import recipes
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf import RangeTest, find_rho
from xsam_hf.analysis import svg
from xsam_hf.trainer.range_test import RHOS, RISE, check


class StopAfter(TrainerCallback):
    """Ends a training after some epochs of a longer schedule."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch > self.epochs - 0.5


def draw(found: RangeTest) -> Figure:
    """How far the loss rises over `rho`, as a share of the loss, with the suggestion and its band."""
    figure, axes = svg.make(figsize=(6, 4))
    shares = [rise / found.loss for rise in found.rises]
    points = [point for point in zip(found.rhos, shares, strict=True) if math.isfinite(point[1]) and point[1] > 0]
    axes.plot(*zip(*points, strict=True), marker="o", ms=3, label="rise of the loss")
    slope = [rho * found.grad_norm / found.loss for rho in found.rhos]
    axes.plot(found.rhos, slope, color="gray", lw=0.8, ls="--", label="slope alone")
    axes.axhline(RISE, color="gray", lw=0.8, ls=":")
    if found.rho is not None:
        axes.axvline(found.rho, color="#D55E00", label=f"suggestion {found.rho:.2g}")
        axes.axvspan(*found.band, color="#D55E00", alpha=0.15, lw=0)
    axes.legend()
    axes.set(xscale="log", yscale="log", xlabel="rho", ylabel="rise along the gradient / loss")
    return figure


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="a recipe of one of the tasks")
    parser.add_argument("--epochs", type=int, default=1, help="of the base optimizer before the test")
    parser.add_argument("--batches", type=int, default=4, help="update batches of the test")
    args, flags = parser.parse_known_args(argv)
    if args.epochs < 0:
        parser.error("--epochs starts at 0")
    for name in ("rho", "method"):
        if name in fields(flags):
            parser.error(f"--{name} stands there, and a range test trains with the base optimizer alone: leave it out")
    task = args.recipe.absolute().parent.parent
    if task.parent != ROOT / "tasks":
        raise ValueError(
            f"{args.recipe} is in no task's folder of recipes: give a file such as tasks/TASK/recipes/NAME.yaml."
        )
    train = importlib.import_module(f"tasks.{task.name}.train")
    given = [str(args.recipe), "--rho", "0", "--eval_strategy", "no", "--save_strategy", "no", *flags]
    trainer = train.prepare(*recipes.parse(train.ARGUMENTS, given, __doc__, "runs/find_rho")).trainer
    if trainer.args.resume_from_checkpoint is not None:
        raise ValueError("A range test trains anew for its epochs: leave out `resume_from_checkpoint`.")
    if trainer.args.max_steps <= 0 and args.epochs > trainer.args.num_train_epochs:
        raise ValueError(
            f"--epochs is {args.epochs}, and the schedule ends after {trainer.args.num_train_epochs:g}: give `--num_train_epochs` too."
        )
    check(trainer, args.batches, RHOS)  # what find_rho refuses, before an epoch is trained for it
    if args.epochs:
        trainer.add_callback(StopAfter(args.epochs))
        trainer.train()
    found = find_rho(trainer, batches=args.batches)
    folder = Path(trainer.args.output_dir)
    kept = {**dataclasses.asdict(found), "rho": found.rho, "band": found.band, "epochs": args.epochs}
    write_whole(folder / "rho.json", json.dumps(kept, indent=1) + "\n")
    svg.save(draw(found), folder / "rho.svg")
    told = (
        f"no suggestion: the loss rises by {RISE:g} of itself nowhere between {found.rhos[0]:g} and {found.rhos[-1]:g}"
    )
    if found.rho is not None:
        told = f"rho {found.rho:.2g} (from {found.band[0]:.2g} to {found.band[1]:.2g})"
    print(f"{told}; {found.forward} forward and {found.backward} backward passes. {folder / 'rho.svg'}")


if __name__ == "__main__":
    run(main)
