"""
Does it matter that bfloat16 buries the ascent? Trains the digits CNN with wrong labels in float32 and with weights that each pass
sees in bfloat16, so coarsely that ε is .95, .6 and .3 of what is seen of it (the cosine of the two; see rounded_training).

    scripts/run buried              # writes results/buried.json; scripts/run summary puts its tables into RESULTS.md
    scripts/run buried --seeds 0 1

Call it again after a failure or an interruption: finished runs are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.run_seeds import ROOT, Run, run_or_exit
from scripts.summarize import keep
from tasks.command import Parser, run


GROUP, RECIPE = "buried", "digits-noise-resnet-small"
RESULT = ROOT / "results" / f"{GROUP}.json"
METHODS = {
    "base": "--method sgd",
    "sam": "--method sam --rho 1",
    "xsam": "--method xsam --rho 0.85",
}  # tuned in float32
OFFSETS = (0, 0.7, 4, 16)
RHOS = (0.1, 0.016, 0.003)  # at which autocast itself buries ε so deep, where the model begins
SEEDS = range(5)


@dataclass(frozen=True)
class RoundedRun(Run):
    """A run of `scripts.rounded_training`."""

    @property
    def module(self) -> str:
        return "scripts.rounded_training"


def runs(seed: int) -> list[RoundedRun]:
    """Those of one seed, in the order in which they are made."""
    named = {
        f"{method}-offset-{offset:g}": f"--offset {offset:g} {flags}"
        for offset in OFFSETS
        for method, flags in METHODS.items()
    }
    return [
        RoundedRun("image_classification", RECIPE, GROUP, name, seed, f"{flags} --eval_strategy no")
        for name, flags in named.items()
    ]


def autocast_runs(seed: int) -> list[RoundedRun]:
    """Those with a `rho` that autocast itself buries."""
    named = {"base-autocast": "--method sgd --bf16 true"}
    for rho in RHOS:
        named[f"sam-rho-{rho:g}"] = f"--method sam --rho {rho:g}"
        named[f"sam-autocast-rho-{rho:g}"] = f"--method sam --rho {rho:g} --bf16 true"
    return [
        RoundedRun("image_classification", RECIPE, GROUP, name, seed, f"--offset 0 {flags} --eval_strategy no")
        for name, flags in named.items()
    ]


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread")
    args = parser.parse_args(argv)
    for part in (runs, autocast_runs):
        for seed in args.seeds:  # outside: an interrupted comparison holds pairs
            run_or_exit(part(seed), args.jobs)
            keep(ROOT / "runs" / GROUP)


if __name__ == "__main__":
    run(main)
