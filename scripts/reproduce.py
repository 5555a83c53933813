"""
The paper's tables and figures, one command each: trains what is not trained yet and prints the table beside the paper's numbers.

    scripts/run reproduce --list                                                    # all of them, and how far each is
    scripts/run reproduce table-2 --data DATA                                       # 5 seeds; call it again to go on
    scripts/run reproduce table-2 --data DATA --settings cifar100-resnet-18 --dry-run
    scripts/run reproduce table-4 --data DATA --examples 2000 --epochs 20 --seeds 3 --flags="--test_examples 1000"

DATA is a folder that holds cifar10, cifar100, tiny-imagenet-200, imagenet, iwslt14, CIFAR-10-C, CIFAR-100-C, as far as they are needed. The
runs are in runs/paper-SETTING; a run that several tables show is made once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scripts.cost import parsed, plan
from scripts.group import FinishedRun, check_metric, check_one_method
from scripts.paper import SETTINGS, TABLES, Number, Setting, Table, deviations, numbers, slug
from scripts.run_flags import OURS, fields, refuse_overridden
from scripts.run_seeds import ROOT, Run, is_finished, run_or_exit
from scripts.table import machine, to_markdown
from tasks import recipes
from tasks.command import Parser, run


# What a run is scored by; the paper does not say which of them it prints, and its code prints the last two.
KINDS = {"last epoch": "test", "last five epochs": "last_five_epochs", "best epoch": "best_epoch"}
CORRUPTED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
GROUPS = ("noise", "blur", "weather", "digital", "corrupted")


@dataclass(frozen=True)
class Cell:
    """A row of a table for one setting: one run for each seed."""

    setting: str
    row: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if is_finished(run)]


def cells(table: Table, options: argparse.Namespace) -> list[Cell]:
    """All rows of a table, with the runs that they are of."""
    return [
        Cell(setting, row, tuple(_run(setting, flags, seed, options) for seed in range(options.seeds)))
        for setting, rows in table.rows.items()
        if options.settings is None or setting in options.settings
        for row, flags in rows.items()
    ]


def _run(setting: str, flags: str, seed: int, options: argparse.Namespace) -> Run:
    of, group = SETTINGS[setting], f"paper-{setting}"
    parts = [of.flags, flags]
    if options.data is not None:
        # Relative, as the commands are; a result is kept with its command.
        folder = os.path.relpath(options.data / of.data, ROOT)
        parts.append(f"{'--data_dir' if of.task == 'image_classification' else '--dataset'} {shlex.quote(folder)}")
    for name, value in (("train_examples", options.examples), ("num_train_epochs", options.epochs)):
        if value is not None:
            parts.append(f"--{name} {value:g}")
            group += f"-{name.rpartition('_')[2]}-{value:g}"
    if options.processes > 1:
        # An update's batch stays the paper's.
        name = "per_device_train_batch_size" if of.task == "image_classification" else "max_tokens"
        parts.append(f"--{name} {_recipe(of)[name] // options.processes}")
    refuse_overridden(" ".join(parts[1:]), options.flags)  # a setting's own model may be another
    parts.append(options.flags)
    return Run(of.task, of.recipe, group, slug(flags), seed, " ".join(filter(None, parts)))


@cache
def _recipe(of: Setting) -> dict[str, Any]:
    return recipes.read(ROOT / "tasks" / of.task / "recipes" / f"{of.recipe}.yaml")


def once(cells: Sequence[Cell]) -> list[Run]:
    """The runs of some rows, those of two rows once; seeds outside, so that an interrupted table holds pairs."""
    runs = dict.fromkeys(run for cell in cells for run in cell.runs)
    return sorted(runs, key=lambda run: run.seed)


def check_data(cells: Sequence[Cell], table: Table, options: argparse.Namespace) -> None:
    """
    Refuses a table whose data is not there; a dry run needs none, but for a folder that is named.

    Raises:
        `ValueError`: so it is; the sentence names the folder.
    """
    for setting in dict.fromkeys(cell.setting for cell in cells):
        of = SETTINGS[setting]
        if options.data is None and not of.hub and not options.dry_run:
            raise ValueError(
                f"{setting} needs a local copy of its data: give the folder that holds {of.data} as --data."
            )
        if options.data is None and table.metric == "corruptions" and not options.dry_run:
            raise ValueError(
                f"The corrupted images are local files: give the folder that holds {CORRUPTED[of.data]} as --data."
            )
        names = [of.data, CORRUPTED[of.data]] if table.metric == "corruptions" else [of.data]
        for name in names if options.data is not None else []:
            if not (options.data / name).exists():
                raise ValueError(
                    f"--data is {options.data}, which has no {name}, and {setting} is trained or scored on it: put it there, or leave "
                    "the setting out with --settings."
                )


# --- what was found ------------------------------------------------------------------------------------------------------


def scores(cell: Cell, metric: str, results: Sequence[dict]) -> dict[str, list[float]]:
    """Of each kind, those of the runs; a kind that one of them has not is left out."""
    if metric == "hours":
        one = len({machine(result) for result in results}) == 1  # a mean over several would be of none
        return {"hours": [result["seconds"] / 3600 for result in results]} if one else {}
    name, scale = ("accuracy", 100) if SETTINGS[cell.setting].task == "image_classification" else ("bleu_tokenised", 1)
    found = {kind: split for kind, split in KINDS.items() if all(split in result["metrics"] for result in results)}
    for split in found.values():
        check_metric({cell.row: results}, name, split, cell.runs[0].folder.parent)
    return {kind: [scale * result["metrics"][split][name] for result in results] for kind, split in found.items()}


def corruption_scores(cell: Cell, runs: Sequence[FinishedRun]) -> dict[str, list[float]]:
    """
    Of each group, those of the runs that were scored on the published images.

    Raises:
        `ValueError`: a run was scored on others, or lacks a group.
    """
    scored, of = [one for one in runs if one.corruptions], CORRUPTED[SETTINGS[cell.setting].data]
    for one in scored:
        missing = [group for group in GROUPS if group not in one.corruptions["groups"]]
        if missing or one.corruptions.get("made_by", of) != of:
            what = f"no group {missing[0]}" if missing else f"scores on images of {one.corruptions['made_by']}"
            raise ValueError(
                f"{one.folder / 'corruptions.json'} has {what}, and the paper's table is of {of}: delete it, and the same command scores "
                "the run again."
            )
    return {group: [100 * one.corruptions["groups"][group] for one in scored] for group in GROUPS} if scored else {}


def runs_of(cell: Cell) -> list[FinishedRun]:
    """
    The runs that are finished.

    Raises:
        `ValueError`: one is damaged, or they differ in more than their seeds.
    """
    runs = [FinishedRun.load(ROOT / run.folder) for run in cell.finished]
    check_one_method([run.folder for run in runs], [run.result for run in runs])
    return runs


def show(name: str, table: Table, found: Sequence[Cell]) -> str:
    """The table, a line for each row: what the paper says, and what the finished runs do, with the distance from it."""
    kinds = {"hours": ["hours"], "corruptions": list(GROUPS), "eigenvalues": ["λ_1", "λ_1/λ_5"]}.get(
        table.metric, list(KINDS)
    )
    nested = table.metric in ("corruptions", "eigenvalues")
    lines = [["setting", "row", *([] if nested else ["paper"]), *kinds, "seeds"]]
    hours: dict[tuple[str, str], tuple[float, tuple]] = {}
    for cell in found:
        paper: Any = numbers(name, cell.setting).get(cell.row)
        runs = runs_of(cell)
        results = [run.result for run in runs]
        values: Mapping[str, list[float]] = {}
        if any(result.get("diverged") for result in results):
            texts = ["diverged"] * len(kinds)
        else:
            if results and table.metric == "corruptions":
                values = corruption_scores(cell, runs)
            elif results and table.metric != "eigenvalues":
                values = scores(cell, table.metric, results)
            of = {kind: paper.get(kind) if isinstance(paper, Mapping) else paper for kind in kinds}
            texts = [_text(values.get(kind), of[kind], isinstance(paper, Mapping)) for kind in kinds]
            if "hours" in values:
                hours[cell.setting, cell.row] = statistics.mean(values["hours"]), machine(results[0])
        printed = [] if nested else ["" if paper is None else str(paper)]
        lines.append([cell.setting, cell.row, *printed, *texts, f"{len(results)} of {len(cell.runs)}"])
    if table.metric == "hours":
        lines = _with_ratios(name, lines, hours)
    return to_markdown(lines)


def _text(values: list[float] | None, paper: Number | None, with_paper: bool) -> str:
    """`81.20 ± 0.10 (-0.4 s)`; where a cell has a number of the paper's own, `81.20 ± 0.10 (paper 81.25)`."""
    if not values or not all(map(math.isfinite, values)):
        return f"(paper {paper})" if with_paper and paper is not None else ""
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    text = str(Number(mean, std))
    if paper is None:
        return text
    if with_paper:
        return f"{text} (paper {paper})"
    far = deviations(mean, std, paper)
    return text if far is None else f"{text} ({far:+.1f} s)"


def _with_ratios(
    name: str, lines: list[list[str]], hours: Mapping[tuple[str, str], tuple[float, tuple]]
) -> list[list[str]]:
    """Hours are of a machine; what XSAM costs there as a multiple of SAM is not."""
    lines[0].append("× SAM (paper)")
    for line in lines[1:]:
        setting, row = line[:2]
        said: Any = numbers(name, setting)
        paper = f"{said[row].mean / said['SAM'].mean:.3f}"
        (ours, here), (sam, there) = (hours.get((setting, of), (math.nan, ())) for of in (row, "SAM"))
        ours = ours / sam if here == there else math.nan
        line.append(f"({paper})" if math.isnan(ours) else f"{ours:.3f} ({paper})")
    return lines


def overview(options: argparse.Namespace) -> str:
    """Every table and figure: what it shows, how many runs it is of, how many are finished, and what is missing or drawn elsewhere."""
    lines = [["name", "shows", "runs", "finished", "remark"]]
    for name, table in TABLES.items():
        runs = once(cells(table, options))
        done = sum(map(is_finished, runs))
        remark = " ".join(filter(None, [table.note, f"`{table.other}`" if table.other else ""]))
        lines.append([name, table.title, str(len(runs) or ""), str(done) if runs else "", remark])
    return to_markdown(lines)


# --- the command -----------------------------------------------------------------------------------------------------------


def score_corruptions(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Scores the finished runs on corrupted images that have not been scored yet."""
    for cell in cells:
        for of in cell.finished:
            if (ROOT / of.folder / "corruptions.json").is_file():
                continue
            folder = options.data / CORRUPTED[SETTINGS[cell.setting].data]
            module = [
                "-m",
                "tasks.image_classification.corruptions",
                str(of.folder),
                "--data_dir",
                str(folder.resolve()),
            ]
            if subprocess.run([sys.executable, *module], cwd=ROOT).returncode:
                sys.exit(f"{of} could not be scored on corrupted images: the same command tries it again.")


def table_name(text: str) -> str:
    """
    The name of a table: `table-2`, `table 2` or `2`.

    Raises:
        `argparse.ArgumentTypeError`: there is none.
    """
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    name = f"table-{name}" if name.isdecimal() else name
    if name not in TABLES:
        raise argparse.ArgumentTypeError(f"there is no {text!r}: choose one of {', '.join(TABLES)}")
    return name


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("table", nargs="?", type=table_name, help="table-2, figure-4, ...; --list names all")
    parser.add_argument("--list", action="store_true", help="name all tables and figures, and how far each is")
    parser.add_argument(
        "--data", type=Path, help="the folder that holds the data sets; default: the hub, for CIFAR and Tiny-ImageNet"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help="some of the table's; default: all"
    )
    parser.add_argument("--examples", type=int, help="train on so many images, or pairs of sentences; default: all")
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    parser.add_argument("--flags", default="", help='for all runs, such as --flags="--bf16 true"')
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread")
    parser.add_argument(
        "--processes", type=int, default=1, help="GPUs that train a run together; they share an update's batch"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the commands, their passes and hours"
    )
    options = parser.parse_args(argv)
    for name in ("seeds", "jobs", "processes", "examples"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} starts at 1")
    _check_flags(parser, options)
    if options.list:
        print(overview(options))
        return
    if options.table is None:
        parser.error("a table is missing: --list names all")
    table = TABLES[options.table]
    if not table.rows:
        raise ValueError(f"{options.table} is not made of trainings: {table.other} makes it.")
    foreign = [name for name in options.settings or [] if name not in table.rows]
    if foreign:
        raise ValueError(f"{options.table} has no setting {foreign[0]}: it has {', '.join(table.rows)}.")
    for name in options.settings or table.rows:
        batch = _recipe(SETTINGS[name]).get("per_device_train_batch_size", 0)
        if batch % options.processes:
            raise ValueError(
                f"--processes is {options.processes}, and {name} has batches of {batch}, which do not divide so: give another number."
            )
    found = cells(table, options)
    check_data(found, table, options)
    if options.dry_run:
        print(plan(once(found), options.processes))
    else:
        parsed(found[0].runs[0])  # which refuses flags that no run would take
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(options.processes)]
        run_or_exit(once(found), options.jobs, launch if options.processes > 1 else ())
        if table.metric == "corruptions":
            score_corruptions(found, options)
    print(f"\n{options.table}: {table.title}. s: standard deviations over the seeds. {table.note}".rstrip())
    if options.examples is not None or options.epochs is not None or options.flags:
        print(
            "These runs are not the paper's: their distance from its numbers tells nothing, the order of methods may."
        )
    print()
    print(show(options.table, table, found))
    if table.other:
        print(f"\nThen: {table.other}")


def _check_flags(parser: Parser, options: argparse.Namespace) -> None:
    try:
        parts = shlex.split(options.flags)
    except ValueError as error:
        parser.error(f"--flags cannot be taken apart: {error}")
    for name in fields(parts):
        if name in OURS:
            parser.error(f"--{name} stands in --flags, and this script gives it to each run")


if __name__ == "__main__":
    run(main)
