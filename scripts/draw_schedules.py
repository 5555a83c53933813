#!/usr/bin/env python
"""
Accuracy against what it cost: a table, and a figure with one point a method (mean and standard deviation over the seeds).

    python scripts/draw_schedules.py results/digits-schedules.json docs/schedules.svg --unit sgd

The cost is the number of examples that went through a backward pass, in units of what the method `--unit` took.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib
from summarize import read
from table import make_rows, to_markdown


matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "xsam_hf"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a file of results/")
    parser.add_argument("figure", type=Path, help="the .svg file to write")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--unit", required=True, metavar="NAME")
    args = parser.parse_args()
    results = read(args.source)
    examples = {
        name: statistics.mean(run["passes"]["backward_examples"] for run in runs) for name, runs in results.items()
    }
    costs = {name: count / examples[args.unit] for name, count in examples.items()}
    rows = sorted(make_rows(results, args.metric), key=lambda row: (costs[row.name], row.name))

    cells = [["method", "cost", f"test {args.metric}", "s", "seeds"]]
    for row in rows:
        spread = "–" if row.std is None else f"{row.std:.2f}"
        cells.append(
            [
                row.name,
                f"{costs[row.name]:.2f}",
                f"{row.mean:.2f} ± {spread}",
                f"{row.seconds:.0f}",
                str(len(row.values)),
            ]
        )
    print(to_markdown(cells))

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    figure.patch.set_facecolor("white")
    for number, row in enumerate(rows):  # methods of the same cost stand close together
        points = axes.errorbar(costs[row.name], row.mean, yerr=row.std, fmt="o", capsize=3)
        axes.annotate(row.name, (costs[row.name], row.mean), xytext=(6, -12 if number % 2 else 4), textcoords="offset points", fontsize=8,
                      color=points[0].get_color())  # fmt: skip
    axes.set(xlabel=f"examples in backward passes, {args.unit} = 1", ylabel=f"test {args.metric}")
    axes.margins(x=0.15)
    figure.savefig(args.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
