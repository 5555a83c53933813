"""
Accuracy against what it cost: a table, and a figure with one point a method (mean and standard deviation over the seeds).

    scripts/run draw_schedules results/digits-schedules.json docs/schedules.svg --unit sgd

The cost is the number of examples that went through a backward pass, in units of what the method `--unit` took.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from scripts.group import check_metric
from scripts.summarize import read
from scripts.table import make_rows, to_markdown
from tasks.command import Parser, run
from xsam_hf.analysis import svg


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("source", type=Path, help="a file of results/")
    parser.add_argument("figure", type=Path, help="the .svg file to write")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--unit", required=True, metavar="NAME")
    args = parser.parse_args(argv)
    results = read(args.source)
    check_metric(results, args.metric, "test")
    if args.unit not in results:
        raise ValueError(f"There is no method {args.unit} in {args.source}: choose one of {', '.join(results)}.")
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
                "" if row.seconds is None else f"{row.seconds:.0f}",
                str(len(row.values)),
            ]
        )
    print(to_markdown(cells))

    figure, axes = svg.make(figsize=(8, 5))
    for number, row in enumerate(rows):  # methods of the same cost stand close together
        points = axes.errorbar(costs[row.name], row.mean, yerr=row.std, fmt="o", capsize=3)
        axes.annotate(row.name, (costs[row.name], row.mean), xytext=(6, -12 if number % 2 else 4), textcoords="offset points", fontsize=8,
                      color=points[0].get_color())  # fmt: skip
    axes.set(xlabel=f"examples in backward passes, {args.unit} = 1", ylabel=f"test {args.metric}")
    axes.margins(x=0.15)
    svg.save(figure, args.figure)


if __name__ == "__main__":
    run(main)
