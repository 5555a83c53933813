"""From results of several methods and seeds to one table: mean ± std, and paired differences with their interval."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from scipy.stats import t


@dataclass(frozen=True)
class Row:
    """One method. `values` holds the metric of each seed; passes and seconds are means over the seeds."""

    name: str
    values: Mapping[int, float]
    forward: float
    backward: float
    seconds: float

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
    """A row for each method, cheapest first. `results` maps its name to the results of its seeds; accuracies in percent."""
    scale = 100 if metric.endswith("accuracy") else 1
    rows = [
        Row(
            name=name,
            values={run["seed"]: scale * run["metrics"][split][metric] for run in runs},
            forward=statistics.mean(run["passes"]["forward"] for run in runs),
            backward=statistics.mean(run["passes"]["backward"] for run in runs),
            seconds=statistics.mean(run["seconds"] for run in runs),
        )
        for name, runs in results.items()
    ]
    return sorted(rows, key=lambda row: (row.backward, row.forward, row.name))


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


def make_cells(rows: Sequence[Row], metric: str, baselines: Sequence[str], split: str = "test") -> list[list[str]]:
    """The table as text, its first line the header."""
    named = {row.name: row for row in rows}
    header = [
        "method",
        f"{split} {metric}",
        *(f"minus {name}" for name in baselines),
        "forward",
        "backward",
        "s",
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
                f"{row.forward:.0f}",
                f"{row.backward:.0f}",
                f"{row.seconds:.0f}",
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
