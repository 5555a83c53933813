"""
A range test for `rho` on a recipe's model and data, and its picture, as for a learning rate: where the loss along the gradient begins to
leave its slope.

    scripts/run find_rho tasks/image_classification/recipes/digits-noise-resnet-small.yaml --epochs 3
    scripts/run find_rho tasks/translation/recipes/handbook-small.yaml --epochs 1 --batches 8 --seed 1

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

from scripts import svg
from scripts.run_seeds import ROOT
from tasks import recipes
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf import RangeTest, find_rho


class StopAfter(TrainerCallback):
    """Ends a training after some epochs of a longer schedule."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch > self.epochs - 0.5


def draw(found: RangeTest) -> Figure:
    """The curvature share over `rho`, the suggestion and its band."""
    figure, axes = svg.make(figsize=(6, 4))
    points = [
        (rho, share) for rho, share in zip(found.rhos, found.curvature_shares, strict=True) if math.isfinite(share)
    ]
    axes.plot(*zip(*points, strict=True), marker="o", ms=3)
    for level in (found.tau, -found.tau):
        axes.axhline(level, color="gray", lw=0.8, ls=":")
    if found.rho is not None:
        axes.axvline(found.rho, color="#D55E00", label=f"suggestion {found.rho:.2g}")
        axes.axvspan(*found.band, color="#D55E00", alpha=0.15, lw=0)
        axes.legend()
    axes.set(xscale="log", xlabel="ρ", ylabel="curvature share c(ρ)", ylim=(-1.05, max(1.05, 2 * found.tau)))
    return figure


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="a recipe of one of the tasks")
    parser.add_argument("--epochs", type=int, default=3, help="of the base optimizer before the test")
    parser.add_argument("--batches", type=int, default=4, help="update batches of the test")
    args, flags = parser.parse_known_args(argv)
    if args.epochs < 0:
        parser.error("--epochs starts at 0")
    task = args.recipe.absolute().parent.parent
    if task.parent != ROOT / "tasks":
        raise ValueError(
            f"{args.recipe} is in no task's folder of recipes: give a file such as tasks/TASK/recipes/NAME.yaml."
        )
    train = importlib.import_module(f"tasks.{task.name}.train")
    given = [str(args.recipe), "--rho", "0", "--eval_strategy", "no", "--save_strategy", "no", *flags]
    trainer = train.prepare(*recipes.parse(train.ARGUMENTS, given, __doc__, "runs/find_rho")).trainer
    if args.epochs:
        trainer.add_callback(StopAfter(args.epochs))
        trainer.train()
    found = find_rho(trainer, batches=args.batches)
    folder = Path(trainer.args.output_dir)
    kept = {**dataclasses.asdict(found), "rho": found.rho, "band": found.band, "epochs": args.epochs}
    write_whole(folder / "rho.json", json.dumps(kept, indent=1) + "\n")
    svg.save(draw(found), folder / "rho.svg")
    told = "no suggestion: the curve does not leave the band of τ inside the grid"
    if found.rho is not None:
        told = f"rho {found.rho:.2g} (from {found.band[0]:.2g} to {found.band[1]:.2g})"
    print(f"{told}; {found.forward} forward and {found.backward} backward passes. {folder / 'rho.svg'}")


if __name__ == "__main__":
    run(main)
