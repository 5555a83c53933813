"""From results of several methods and seeds to one table: mean ± std, and paired differences with their interval."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from scipy.stats import t


BEST_EPOCH = ", best epoch"  # ends the name of a row that shows plain training's best epoch


@dataclass(frozen=True)
class Row:
    """
    One method: means over the seeds, but for `values`.

    Args:
        name (`str`): the method's.
        values (`Mapping[int, float]`): the metric of each seed.
        forward, backward (`float`): how many passes a run made. Over the examples of a batch where all results of the table tell them
            (a pass over a part of it is a part of a pass), over batches otherwise.
        seconds (`float`, *optional*): that a run took; none where not all runs of the table were timed on the same machine.
        learnt (`float`, *optional*): the share of the wrong labels that the trained model gives back.
    """

    name: str
    values: Mapping[int, float]
    forward: float
    backward: float
    seconds: float | None
    learnt: float | None = None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Mean of a method's value minus the baseline's at the same seed, with its 95 % interval by Student's t."""

    mean: float
    margin: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        return self.margin is not None and abs(self.mean) > self.margin


def make_rows(results: Mapping[str, Sequence[dict]], metric: str, split: str = "test") -> list[Row]:
    """
    A row for each method, cheapest first; accuracies in percent.

    Where the test split was scored during training, plain training (`rho` 0) has another row for its best epoch: early stopping with
    hindsight, which has to make all the passes to know.

    Args:
        results (`Mapping[str, Sequence[dict]]`): those of the seeds, by the method's name.
        metric, split (`str`): which score.
    """
    scale = 100 if metric.endswith("accuracy") else 1
    every = [run for runs in results.values() for run in runs]
    over, timed = counted_over(every), len({machine(run) for run in every}) == 1

    def make_row(name: str, runs: Sequence[dict], split: str) -> Row:
        learnt = [run["metrics"]["wrong_labels"]["accuracy"] for run in runs if "wrong_labels" in run["metrics"]]
        return Row(
            name=name,
            values={run["seed"]: scale * run["metrics"][split][metric] for run in runs},
            forward=statistics.mean(run["passes"][f"forward{over}"] for run in runs),
            backward=statistics.mean(run["passes"][f"backward{over}"] for run in runs),
            seconds=statistics.mean(run["seconds"] for run in runs) if timed else None,
            learnt=statistics.mean(learnt) if len(learnt) == len(runs) and split != "best_epoch" else None,
        )

    rows = [make_row(name, runs, split) for name, runs in results.items()]
    if split == "test":
        rows += [
            make_row(name + BEST_EPOCH, runs, "best_epoch")
            for name, runs in results.items()
            if all(run.get("arguments", {}).get("rho") == 0 and "best_epoch" in run["metrics"] for run in runs)
        ]
    return sorted(rows, key=lambda row: (row.backward, row.forward, row.name))


def counted_over(results: Iterable[Mapping]) -> str:
    """How the names of passes end that all results count alike: those over examples if all have them."""
    kinds = ("forward_examples", "backward_examples")
    return "_examples" if all(kind in run["passes"] for run in results for kind in kinds) else ""


def machine(run: Mapping) -> tuple:
    """What seconds of two runs must have in common to be compared."""
    told = (run.get("device"), run.get("threads"), run.get("processes", 1), run.get("versions", {}).get("torch"))
    return tuple(map(str, told))


def paired_difference(row: Row, baseline: Row) -> Difference | None:
    """None if the two have no seed in common; without a margin if one pair, or pairs that all differ alike, give none."""
    seeds = row.values.keys() & baseline.values.keys()
    if not seeds:
        return None
    differences = [row.values[seed] - baseline.values[seed] for seed in seeds]
    pairs = len(differences)
    spread = statistics.stdev(differences) if pairs > 1 else 0.0
    # Accuracies come in steps of one example, so that all pairs can differ by the same step, up to rounding.
    margin = t.ppf(0.975, pairs - 1) * spread / pairs**0.5 if spread > 1e-9 else None
    return Difference(statistics.mean(differences), margin, pairs)


def equal_passes(rows: Sequence[Row]) -> list[list[Row]]:
    """The groups of rows, sorted as `make_rows` does, with the same number of backward passes."""
    return [list(group) for _, group in groupby(rows, key=lambda row: round(row.backward))]


def make_cells(
    rows: Sequence[Row], metric: str, baselines: Sequence[str], split: str = "test", seconds: bool = True
) -> list[list[str]]:
    """
    The table as text, its first line the header. Passes are multiples of the cheapest row's.

    Args:
        rows, baselines: the methods, and the names of those to take differences to.
        metric, split (`str`): which score.
        seconds (`bool`, *optional*, defaults to `True`): `False` where other processes shared the machine. Rows without any have none.
    """
    seconds = seconds and all(row.seconds is not None for row in rows)
    named = {row.name: row for row in rows}
    forward, backward = (min(passes) for passes in zip(*((row.forward, row.backward) for row in rows), strict=True))
    noisy = any(row.learnt is not None for row in rows)
    header = [
        "method",
        f"{split} {metric}",
        *(f"minus {name}" for name in baselines),
        *["wrong labels learnt"] * noisy,
        "passes",
        "forward",
        *["s"] * seconds,
        "seeds",
    ]
    lines = [header]
    for row in rows:
        differences = (None if row.name == name else paired_difference(row, named[name]) for name in baselines)
        lines.append(
            [
                row.name,
                f"{row.mean:.2f} ± " + ("–" if row.std is None else f"{row.std:.2f}"),
                *map(format_difference, differences),
                *["" if row.learnt is None else f"{row.learnt:.0%}"] * noisy,
                f"{row.backward / backward:.2f}",
                f"{row.forward / forward:.2f}",
                *([f"{row.seconds:.0f}"] if seconds else []),
                str(len(row.values)),
            ]
        )
    return lines


def format_difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.2f} ± " + ("–" if difference.margin is None else f"{difference.margin:.2f}")


def to_markdown(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
