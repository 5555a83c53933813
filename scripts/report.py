"""
Turns the runs of a group, as `run_seeds` leaves them, into a table on the terminal and a page of HTML beside them.

    scripts/run report runs/demo --baselines AdamW-2x SAM

The page holds everything in itself: table, training curves, what the search for α saw, commands and versions.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from scripts.figures import plot_curves, plot_searches
from scripts.group import FinishedRun, check_metric, load_group
from scripts.run_flags import check_once
from scripts.table import BEST_EPOCH, Row, equal_passes, make_cells, make_rows, paired_difference, to_markdown
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf.analysis import page
from xsam_hf.analysis.page import paragraphs, to_figure, to_table
from xsam_hf.analysis.svg import draw


FIGURES = (
    "Mean ± standard deviation over the seeds; differences are paired by seed, ± half of their 95 % interval. "
    "Passes are those that go backward, counted over examples; forward are all that go forward; both are multiples of the cheapest row's."
)


def join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def compare_passes(rows: Sequence[Row]) -> list[str]:
    sentences = []
    unit = min(row.backward for row in rows)
    for group in equal_passes([row for row in rows if not row.name.endswith(BEST_EPOCH)]):
        names, passes = join([row.name for row in group]), f"{group[0].backward / unit:.2f}"
        if len(group) == 1:
            sentences.append(f"{names} made {passes} times the cheapest row's backward passes, and no other row did.")
            continue
        sentences.append(f"{names} made {passes} times the cheapest row's backward passes and can be compared.")
        least = min(row.forward for row in group)
        sentences += [
            f"{row.name} made {row.forward / least - 1:.0%} more forward passes."
            for row in group
            if row.forward > least
        ]
    return sentences


def conclude(rows: Sequence[Row], metric: str, baselines: Sequence[str]) -> list[str]:
    """What the differences at equal passes allow to be said; a best epoch is compared with, and not compared."""
    sentences = []
    for group in equal_passes(rows):
        references = [row for name in baselines for row in group if row.name == name]
        for position, reference in enumerate(references):
            # Of two baselines only one is compared with the other.
            others = (row for row in group if row not in references[: position + 1])
            sentences += [compare(row, reference, metric) for row in others if not row.name.endswith(BEST_EPOCH)]
    return sentences


def compare(row: Row, reference: Row, metric: str) -> str:
    """One difference, its interval, and which of the two was higher, if the interval says so."""
    unit = " points" if metric.endswith("accuracy") else ""
    difference = paired_difference(row, reference)
    who = f"{row.name} minus {reference.name}"
    if difference is None:
        return f"{who}: no seed in common, so nothing can be said."
    if difference.margin is None:
        why = "one pair of seeds gives" if difference.pairs == 1 else "pairs that all differ alike give"
        return f"{who}: {difference.mean:+.2f}{unit}, without an interval, since {why} none: nothing can be concluded."
    low, high = difference.mean - difference.margin, difference.mean + difference.margin
    verdict = (
        f"{row.name} was {'higher' if difference.mean > 0 else 'lower'} in {metric}."
        if difference.is_clear
        else "these runs do not tell the two apart."
    )
    return (
        f"{who}: {difference.mean:+.2f}{unit}, 95 % interval {low:+.2f} to {high:+.2f} over {difference.pairs} pairs of seeds: "
        f"{verdict}"
    )


def describe_searches(runs: Mapping[str, Sequence[FinishedRun]]) -> str:
    sentences = [
        "Left, up to eight searches of the first seed: the loss on the arc minus that of SAM's direction (α = 1), "
        "as a share of the curve's range, with a dot at the α chosen."
    ]
    for name, seeds in runs.items():
        searches = [search for run in seeds for search in run.searches]
        chosen = np.array([search["alpha"] for search in searches])
        edge = np.mean([search["alpha"] in (search["alphas"][0], search["alphas"][-1]) for search in searches])
        sentences.append(
            f"{name}: α between {chosen.min():.2f} and {chosen.max():.2f}, {chosen.mean():.2f} on average over "
            f"{len(searches)} searches, {edge:.0%} of them at an end of the grid."
        )
    return " ".join(sentences)


def make_page(
    runs: Mapping[str, Sequence[FinishedRun]],
    rows: Sequence[Row],
    unfinished: Sequence[str],
    metric: str,
    baselines: Sequence[str],
    lead: Callable[[Sequence[Row]], list[str]] | None = None,
) -> tuple[str, str]:
    """The text for the terminal and the page; `lead` makes the paragraphs that both begin with."""
    cells = make_cells(rows, metric, baselines)
    conclusion = [
        " ".join(compare_passes(rows)),
        *conclude(rows, metric, baselines),
        "The intervals speak of the seeds only: another data set, model or tuning can turn them round.",
    ]
    if unfinished:
        conclusion.append(f"Not finished, and so not in the table: {join(unfinished)}.")

    runs = {row.name: runs[row.name] for row in rows if row.name in runs}
    searching = {name: kept for name, seeds in runs.items() if (kept := [run for run in seeds if run.searches])}
    curves = to_figure("Training", draw(plot_curves, runs, metric), "A line is one seed.")
    search = (
        to_figure("The search for α", draw(plot_searches, searching), describe_searches(searching))
        if searching
        else ""
    )
    opening = lead(rows) if lead else []

    every = [run for seeds in runs.values() for run in seeds]
    first = every[0].result
    facts = {
        "seeds": sorted({run.result["seed"] for run in every}),
        "device": sorted({run.result["device"] for run in every}),
        "threads a run": sorted({run.result["threads"] for run in every}),
        "commit": sorted({run.result.get("git_commit") or "none" for run in every}),
        **{name: sorted({str(run.result["versions"][name]) for run in every}) for name in first["versions"]},
    }
    commands = [
        f"# {name}, seed {seeds[0].result['seed']}\npython {shlex.join(seeds[0].command)}"
        for name, seeds in runs.items()
    ]
    made = page.make_page(
        f"{join(list(runs))} on {first['dataset']}",
        f"{first['task'].replace('_', ' ')}, {first['model']}",
        [
            paragraphs(opening),
            curves,
            f'<h2>The figures</h2>\n<div class="scroll">{to_table(cells)}</div>\n<p class="soft">{FIGURES}</p>',
            f'<h2>What these runs say</h2>\n<div class="box">{paragraphs(conclusion)}</div>',
            search,
            "<h2>How they were made</h2>",
            '<p class="soft">'
            + escape("; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in facts.items()))
            + "</p>",
            f"<pre>{escape(chr(10).join(commands))}</pre>",
        ],
    )
    return "\n\n".join(filter(None, [*opening, to_markdown(cells), "\n".join(conclusion)])), made


def report(
    group: Path, metric: str, baselines: Sequence[str], lead: Callable[[Sequence[Row]], list[str]] | None = None
) -> None:
    """Writes the page of a group, and says the same on the terminal; see [`make_page`]."""
    if not group.is_dir():
        raise ValueError(f"There is no folder {group}: give one of runs/.")
    runs, unfinished = load_group(group)
    results = {name: [run.result for run in seeds] for name, seeds in runs.items()}
    check_metric(results, metric, "test")
    rows = make_rows(results, metric)
    if missing := [name for name in baselines if name not in [row.name for row in rows]]:
        raise ValueError(f"There is no finished run of the baseline {join(missing)} in {group}.")
    text, made = make_page(runs, rows, unfinished, metric, baselines, lead)
    write_whole(group / "report.html", made)
    print(f"{text}\n\nWith the curves: {group / 'report.html'}")


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("group", type=Path, help="a folder of runs/")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--baselines", nargs="+", default=[], metavar="NAME", help="methods to take differences to")
    args = parser.parse_args(argv)
    check_once(parser, baselines=args.baselines)
    report(args.group, args.metric, args.baselines)


if __name__ == "__main__":
    run(main)
