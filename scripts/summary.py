"""
Writes what the study found into RESULTS.md, between its two marks: one table of all settings and methods, and one for each setting; and
docs/gain.svg, the gains against the passes that they cost.

    scripts/run summary             # after scripts/run study
    scripts/run summary --check     # writes nothing, and fails if RESULTS.md says something else than results/
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from scripts import buried, epoch_cost, study, surfaces, sweep
from scripts.group import check_metric
from scripts.run_seeds import ROOT
from scripts.study_settings import ORDER
from scripts.summarize import read
from scripts.table import (
    BEST_EPOCH,
    Difference,
    Row,
    format_difference,
    make_cells,
    make_rows,
    paired_difference,
    to_markdown,
)
from tasks.command import Parser, run
from tasks.files import write_whole
from tasks.image_classification.corruptions import GROUPS
from xsam_hf.analysis import svg


BEGIN, END = "<!-- scripts/run summary writes from here -->", "<!-- to here -->"
COSTS = """### What XSAM costs beside SAM (the paper's table 1)

`scripts/run benchmark --configuration MODEL --methods sam "xsam, alpha kept" "xsam, search" --warm_up 1` on images of 32×32 pixels, one thread:
updates of SAM, of XSAM without a search and with one, in turn. In updates of SAM: median and range over the rounds of an update that keeps α,
what of it is XSAM's own arithmetic beyond SAM's, and a search. An epoch by arithmetic: the passes are the same, arithmetic on the weights
does not grow with the batch, and there is one search."""
SURFACES = """### How sharp the loss is at the end (the paper's table 16 and figures 11, 12 and 16)

Made as [docs/analysis.md](docs/analysis.md#runs-seen) says, on four training batches, wrong labels included. Ratios are paired by seed:
geometric means with their 95 % intervals. Below them the batches in which the loss at the distance of two `rho` is higher along the gradient
g₁ after the ascent than along g₀, and along v(α\\*) than along g₁."""
# Trained apart from the study, by scripts/run run_seeds: file of results/, title and first method of the table.
ON_A_GPU = {
    "cifar100-resnet-18": ("ResNet-18, all of CIFAR-100, 4 of the paper's 200 epochs", "sgd-2x"),
    "cifar100-vit-ti": ("ViT-Ti, all of CIFAR-100, 4 of the paper's 300 epochs", "adamw-2x"),
}
BASELINES = ("base-2x", "base" + BEST_EPOCH, "base-2x" + BEST_EPOCH, "sam")


def equal_base(row: Row, rows: Mapping[str, Row]) -> Row:
    """The base optimizer with as many passes as a row, or more: a row that made no more than `base` is compared with that."""
    return rows["base"] if row.backward <= 1.005 * rows["base"].backward else rows["base-2x"]


def overview(settings: Mapping[str, Mapping[str, Row]]) -> str:
    """
    Settings by methods: the gain over the base optimizer at equal passes, with half of its 95 % interval and, for the other methods
    that climb, as a share of XSAM's where its interval tells that from 0.
    """
    names = [name for name in ORDER if any(name in rows for rows in settings.values())]
    cells = [["method", "passes", *(study.SETTINGS[setting].short for setting in settings)]]
    for name in names:
        passes = [rows[name].backward / rows["base"].backward for rows in settings.values() if name in rows]
        line = [name, f"{statistics.mean(passes):.2f}"]
        for rows in settings.values():
            if name not in rows:
                line.append("")
            elif name in ("base", "base-2x"):
                line.append(f"{rows[name].mean:.2f} %")
            else:
                gain = _gain(rows, name)
                xsam = _gain(rows, "xsam") if name in study.METHODS and name != "xsam" else None
                share = f" ({gain.mean / xsam.mean:.0%})" if gain and xsam and xsam.is_clear and xsam.mean > 0 else ""
                line.append(format_difference(gain) + share)
        cells.append(line)
    return to_markdown(cells)


def _gain(rows: Mapping[str, Row], name: str) -> Difference | None:
    return paired_difference(rows[name], equal_base(rows[name], rows)) if name in rows else None


def draw(settings: Mapping[str, Mapping[str, Row]]) -> Figure:
    """A panel for each setting: the gain of each method, with its 95 % interval, against its passes."""
    columns = min(len(settings), 3)
    lines = math.ceil(len(settings) / columns)
    figure, panels = svg.make(columns, lines, figsize=(4.2 * columns, 4 * lines), squeeze=False)
    for axes in panels.flat[len(settings) :]:
        axes.remove()
    for axes, (setting, rows) in zip(panels.flat, settings.items(), strict=False):
        for number, name in enumerate(name for name in study.METHODS if name in rows):
            row = rows[name]
            difference = _gain(rows, name)
            if difference is None or row in (rows["base"], rows["base-2x"]):
                continue
            passes = row.backward / rows["base"].backward
            points = axes.errorbar(passes, difference.mean, yerr=difference.margin, fmt="o", capsize=3)
            place = (-6, -12) if passes > 1.5 else (6, -12 if number % 2 else 4)
            axes.annotate(
                name,
                (passes, difference.mean),
                xytext=place,
                textcoords="offset points",
                ha="right" if passes > 1.5 else "left",
                fontsize=8,
                color=points[0].get_color(),
            )
        axes.set(title=study.SETTINGS[setting].short, xlabel="passes an update", ylabel="points above the base")
        axes.axhline(0, color="gray", lw=0.8)
        axes.margins(x=0.3)
    return figure


def describe_tuning(setting: str) -> str:
    """Which `rho` each method has, among which, and whether the best stood at an end."""
    parts = []
    for method, scores in study.tuning(setting).items():
        best, grid = study.best_rho(scores), list(scores)
        end = " (at the end of its grid)" if best in (grid[0], grid[-1]) else ""
        parts.append(f"{method} {best:g}{end} of {', '.join(f'{rho:g}' for rho in grid)}")
    return "; ".join(parts)


def section(setting: str, results: Mapping[str, Sequence[dict]]) -> str:
    """One setting: what it is, its `rho`s, and a table for each of its scores."""
    of = study.SETTINGS[setting]
    files = [name for name in (of.earlier, setting) if name and (ROOT / "results" / f"{name}.json").is_file()]
    links = " and ".join(f"[results/{name}.json](results/{name}.json)" for name in files)
    tunings = " and ".join(f"[results/{name}-tuning.json](results/{name}-tuning.json)" for name in files)
    parts = [
        f"### {of.title}\n\n`scripts/run study {setting}`; {links}. `rho` by validation {of.metrics[0]} ({tunings}): "
        f"{describe_tuning(setting)}."
    ]
    for metric in of.metrics:
        rows = make_rows(results, metric)
        baselines = [name for name in BASELINES if name in named(rows)]
        parts.append(to_markdown(make_cells(rows, metric, baselines, seconds=False)))
    return "\n\n".join(parts)


def corruption_section(setting: str, results: Mapping[str, Sequence[dict]]) -> str | None:
    """How the models of a setting score on corrupted test images, where they were asked."""
    scored = {name: [run for run in runs if "corruptions" in run] for name, runs in results.items()}
    scored = {name: runs for name, runs in scored.items() if runs}
    if not scored:
        return None

    def rows(group: str) -> dict[str, Row]:
        as_test = {
            name: [run | {"metrics": {"test": {"accuracy": run["corruptions"]["groups"][group]}}} for run in runs]
            for name, runs in scored.items()
        }
        return named(make_rows(as_test, "accuracy"))

    by_group = {group: rows(group) for group in (*GROUPS, "corrupted")}
    corrupted = by_group["corrupted"]
    baselines = [name for name in BASELINES if name in corrupted]
    cells = [["method", *by_group, *(f"corrupted, minus {name}" for name in baselines), "seeds"]]
    for name, row in corrupted.items():
        means = [f"{of[name].mean:.2f}" for of in by_group.values()]
        differences = [paired_difference(row, corrupted[other]) if other != name else None for other in baselines]
        cells.append([name, *means, *map(format_difference, differences), str(len(row.values))])
    facts = next(iter(scored.values()))[0]["corruptions"]
    return (
        f"### {study.SETTINGS[setting].short}: corrupted test images (the paper's table 15)\n\n"
        f"`python -m tasks.image_classification.corruptions runs/{setting}/*/seed-* --data_dir DATA/{setting} --made "
        f"--test_examples {facts['test_examples']}`; [results/{setting}.json](results/{setting}.json). 19 corruptions at five severities, "
        f"ImageNet-C's and not CIFAR-C's, made by {facts['made_by']}.\n\n{to_markdown(cells)}"
    )


def gpu_section(name: str, title: str, base: str) -> str:
    """What was trained on a GPU with the paper's recipes, for a few epochs."""
    path = ROOT / "results" / f"{name}.json"
    results = read(path)
    check_metric(results, "accuracy", "test", path)
    table = to_markdown(make_cells(make_rows(results, "accuracy"), "accuracy", [base, "sam"]))
    return (
        f"### On an H100: {title}\n\n[results/{name}.json](results/{name}.json). Passes are multiples of the fewest in the table, and differences "
        f"are those of the seeds that both methods have.\n\n{table}"
    )


def sweep_section(name: str, results: Mapping[str, Sequence[dict]]) -> str:
    """One sweep: what is varied, and its table beside the methods that are varied."""
    of = sweep.SWEEPS[name]
    metric = study.SETTINGS[of.setting].metrics[0]
    table = to_markdown(make_cells(make_rows(results, metric), metric, of.baselines, seconds=False))
    return (
        f"### {study.SETTINGS[of.setting].short}: {of.title}\n\n`scripts/run sweep {name}`; "
        f"[results/{name}.json](results/{name}.json). `rho` is the study's, and nothing else is tuned.\n\n{table}"
    )


def named(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def results() -> dict[str, dict[str, list[dict]]]:
    """
    Those of each setting that has any.

    Raises:
        `ValueError`: one lacks the base optimizer's, which all others are compared with.
    """
    found = {setting: of for setting in study.SETTINGS if (of := study.results(setting))}
    for setting, of in found.items():
        in_overview = (
            study.SETTINGS[setting].metrics[0] == "accuracy"
        )  # where a pass an update is compared with `base`
        study.check_methods(setting, of, ("base", "base-2x") if in_overview else ("base-2x",))
    return found


def images(found: Mapping[str, Mapping[str, Sequence[dict]]]) -> dict[str, dict[str, Row]]:
    """Setting by setting, the rows of those that are scored by accuracy."""
    return {
        setting: named(make_rows(results, "accuracy"))
        for setting, results in found.items()
        if study.SETTINGS[setting].metrics[0] == "accuracy"
    }


def summary() -> str:
    """All of it, from the files of results/."""
    found = results()
    table = overview(images(found))
    picture = "![Points above the base at equal passes, against passes](docs/gain.svg)"
    sections = [section(setting, of) for setting, of in found.items()]
    if rounded := buried.results_in(ROOT / "results"):
        sections.append(buried.section(rounded, study.results(buried.FLOAT32)))
    sections += [text for setting, of in found.items() if (text := corruption_section(setting, of))]
    sections += [
        gpu_section(name, *of) for name, of in ON_A_GPU.items() if (ROOT / "results" / f"{name}.json").is_file()
    ]
    sections += [sweep_section(name, of) for name in sweep.SWEEPS if (of := sweep.results(name))]
    if costs := epoch_cost.section():
        sections.append(f"{COSTS}\n\n{costs}")
    if seen := [text for setting in study.SETTINGS if (text := surfaces.section(setting))]:
        sections += [SURFACES, *seen]
    return "\n\n".join([table, picture, *sections])


def replaced(text: str) -> str:
    """RESULTS.md with the summary as it is now."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"RESULTS.md should have the lines {BEGIN} and {END} once each.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{summary()}\n\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    path = ROOT / "RESULTS.md"
    old = path.read_text(encoding="utf-8")
    new = replaced(old)
    if args.check and new != old:
        raise ValueError("RESULTS.md does not say what results/ does: scripts/run summary writes it anew.")
    if not args.check:
        write_whole(path, new)
        (ROOT / "docs").mkdir(exist_ok=True)
        svg.save(draw(images(results())), ROOT / "docs" / "gain.svg")


if __name__ == "__main__":
    run(main)
