"""
`bash scripts/demo` without its set-up: a small residual CNN on digits with 30 % wrong labels.

SGD, SGD with twice the epochs (the passes that SAM and XSAM take), SAM, XSAM, and SAM with stale ascent (the passes that SGD takes), each
with the `rho` that `scripts/run study digits-noise` has chosen for it, on other seeds. Three quarters of the study's epochs: the table and
the page are there in five minutes.
"""

from collections.abc import Sequence

from scripts import study
from scripts.report import compare, join, report
from scripts.run_seeds import ROOT, Run, run_or_exit
from scripts.table import BEST_EPOCH, Row, paired_difference
from tasks.command import Parser, run


SETTING, SEEDS, SHARE_OF_EPOCHS = "digits-noise", 5, 0.75
# For methods whose best epoch is not shown: a rarer look at the base would find a worse one.
EVERY_SECOND_EPOCH = "--eval_strategy steps --eval_steps 34"
METHODS = {"SGD": "base", "SGD-2x": "base-2x", "SAM": "sam", "XSAM": "xsam", "SAM-stale": "stale-sam"}


def lead(rows: Sequence[Row]) -> list[str]:
    """Two paragraphs: what the reader sees and what it cost, and what the intervals allow to say of it."""
    row = {one.name: one for one in rows}
    plain, twice = row["SGD"], row["SGD-2x"]
    best = max((row["SGD" + BEST_EPOCH], row["SGD-2x" + BEST_EPOCH]), key=lambda one: one.mean)
    climbing = [row[name] for name in METHODS if name not in ("SGD", "SGD-2x")]
    parts = [
        f"{one.name} ({one.backward / plain.backward:.1f} times SGD's passes) learns {one.learnt:.0%} and ends at {one.mean:.1f} %"
        for one in climbing
    ]
    seen = [
        f"Three in ten of the training labels are wrong. SGD learns {plain.learnt:.0%} of them and ends at {plain.mean:.1f} % of the "
        f"test images, whose labels are right; with twice the passes it learns {twice.learnt:.0%} and ends at {twice.mean:.1f} %.",
        join(parts) + ".",
        f"{best.name}, which nobody knows without the test labels, had {best.mean:.1f} %.",
    ]
    allowed = []
    for reference in (twice, best):
        above = [one.name for one in climbing if _sign(one, reference) > 0]
        if above:
            pairs = len(reference.values)
            allowed.append(
                f"Over {pairs} pairs of seeds the 95 % intervals of {join(above)} minus {reference.name} lie above 0."
            )
        allowed += [compare(one, reference, "accuracy") for one in climbing if one.name not in above]
    allowed.append(compare(row["XSAM"], row["SAM"], "accuracy"))
    return [" ".join(seen), " ".join(allowed)]


def _sign(row: Row, reference: Row) -> int:
    """Of a difference that its interval allows to speak of; 0 for others."""
    difference = paired_difference(row, reference)
    if difference is None or not difference.is_clear:
        return 0
    return 1 if difference.mean > 0 else -1


def main(argv: Sequence[str]) -> None:
    Parser(description=__doc__).parse_args(argv)
    of, rhos = study.SETTINGS[SETTING], study.chosen(SETTING)
    runs = [
        Run(
            of.task,
            of.recipe,
            "demo",
            name,
            seed,
            study.flags(SETTING, method, rhos.get(method), SHARE_OF_EPOCHS)
            + ("" if method in ("base", "base-2x") else f" {EVERY_SECOND_EPOCH}"),
        )
        for seed in range(SEEDS)
        for name, method in METHODS.items()
    ]
    run_or_exit(runs, jobs=2)
    baselines = ["SGD-2x", "SGD" + BEST_EPOCH, "SGD-2x" + BEST_EPOCH, "SAM"]
    report(ROOT / "runs" / "demo", "accuracy", baselines, lead)


if __name__ == "__main__":
    run(main)
