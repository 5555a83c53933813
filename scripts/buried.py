"""
Does it matter that bfloat16 buries the ascent? Trains the digits CNN with wrong labels with weights that every pass sees in bfloat16,
rounded so coarsely that the cosine of ε with what is seen of it is .95, .6 and .3 (see rounded_training). The same in float32 is the
study `digits-noise`.

    scripts/run buried              # writes results/buried.json; scripts/run summary puts the table into RESULTS.md
    scripts/run buried --seeds 0 1

Call it again after a failure or an interruption: finished runs are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from scripts.group import check_metric
from scripts.run_flags import parse_count, parse_seed
from scripts.run_seeds import ROOT, Run, run_or_exit
from scripts.study import check_methods
from scripts.study_settings import SETTINGS
from scripts.summarize import keep, read
from scripts.table import Row, format_difference, make_rows, paired_difference, to_markdown
from tasks.command import Parser, run


GROUP, FLOAT32 = "buried", "digits-noise"  # a group of runs, and a setting of the study
METHODS = {
    "base": "--method sgd",
    # Each with the `rho` that was tuned in float32.
    "sam": "--method sam --rho 1",
    "xsam": "--method xsam --rho 0.85",
}
OFFSETS = (0.7, 4, 16)
SEEDS = range(5)


@dataclass(frozen=True)
class RoundedRun(Run):
    """A run of `scripts.rounded_training`."""

    @property
    def module(self) -> str:
        return "scripts.rounded_training"


def name_of(method: str, offset: float) -> str:
    return f"{method}-offset-{offset:g}"


def runs(offset: float, seed: int) -> list[RoundedRun]:
    """Those that are compared with each other."""
    return [
        RoundedRun(
            "image_classification",
            SETTINGS[FLOAT32].recipe,
            GROUP,
            name_of(method, offset),
            seed,
            f"--offset {offset:g} {flags} --eval_strategy no",
        )
        for method, flags in METHODS.items()
    ]


def section(results: Mapping[str, Sequence[dict]], whole: Mapping[str, Sequence[dict]]) -> str:
    """
    The table of RESULTS.md: how deep the ascent was buried, and what climbing gained all the same.

    Args:
        results, whole (`Mapping[str, Sequence[dict]]`): of these runs, and of those in float32, by name.
    """
    rows: dict[str, Row] = {row.name: row for row in make_rows(results, "accuracy")}
    check_methods(FLOAT32, whole, METHODS)
    exact = {row.name: row for row in make_rows(whole, "accuracy") if row.name in METHODS}
    cells = [["weights", "cosine", "length", "share", *METHODS, "sam minus base", "xsam minus base", "sam minus float32's", "xsam minus float32's", "seeds"]]  # fmt: skip
    for offset in (0, *OFFSETS):
        names = {method: name_of(method, offset) for method in METHODS}
        named = exact if offset == 0 else {method: rows[name] for method, name in names.items() if name in rows}
        if len(named) < len(METHODS):
            continue
        seen = [result["seen"] for result in results.get(names["sam"], ())]
        climbing = [method for method in METHODS if method != "base"]
        cells.append(
            [
                f"bfloat16, offset {offset:g}" if offset else "float32",
                *(f"{fmean(of[key] for of in seen):.2f}" if seen else "1" for key in ("cosine", "length", "along")),
                *(f"{row.mean:.2f}" for row in (named[method] for method in METHODS)),
                *(format_difference(paired_difference(named[m], named["base"])) for m in climbing),
                *(format_difference(paired_difference(named[m], exact[m])) if offset else "" for m in climbing),
                f"{min(len(row.values) for row in named.values())}",
            ]
        )
    return (
        "### Where bfloat16 buries the ascent: digits, 30 % of the labels wrong, residual CNN, SGD\n\n"
        f"`scripts/run buried`; [results/{GROUP}.json](results/{GROUP}.json), and [results/{FLOAT32}.json](results/{FLOAT32}.json) in "
        "float32. Test accuracy; cosine, length and share are of SAM's ascent, means over the training.\n\n"
        f"{to_markdown(cells)}"
    )


def results_in(folder: Path) -> dict[str, list[dict]]:
    """The results that a folder keeps; empty if there are none."""
    path = folder / f"{GROUP}.json"
    found = read(path) if path.is_file() else {}
    check_metric(found, "accuracy", "test", path)
    return found


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=parse_seed, default=list(SEEDS))
    parser.add_argument(
        "--jobs", type=parse_count, default=1, help="runs at a time; with more than one, each has one thread"
    )
    args = parser.parse_args(argv)
    for offset in reversed(OFFSETS):  # the deepest first
        for seed in args.seeds:
            run_or_exit(runs(offset, seed), args.jobs)
            keep(ROOT / "runs" / GROUP)


if __name__ == "__main__":
    run(main)
