"""
Where climbing pays: trains one setting with all methods of the study, each with a `rho` of its own.

    scripts/run study digits-noise --jobs 2     # writes results/digits-noise-tuning.json and results/digits-noise.json
    scripts/run study digits-noise --methods base base-2x sam xsam --seeds 0 1 2

`rho` is chosen by the validation score on seeds that no table shows: three values, each √2 times the one before, and more of them as
long as the best one stands at an end, or none trains. A `rho` that results/ holds already is taken; --tune_only tunes it anew. Call the
script again after a failure or an interruption: finished runs are kept. New runs go into results/, in place of those of the same method and
seed, and the table is printed.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.asked import asked, check_asked, recipe_of
from scripts.group import FinishedRun, check_metric
from scripts.run_flags import check_once, fields, parse_count, parse_flags, parse_seed, refuse_overridden
from scripts.run_seeds import ROOT, Run, run_or_exit
from scripts.study_settings import METHODS, SETTINGS
from scripts.summarize import keep, read
from scripts.table import make_cells, make_rows, to_markdown
from tasks import recipes
from tasks.command import Parser, run


QUICK = "--eval_strategy no"
MOST_VALUES = 8  # of rho: where climbing does not pay, the best is always the shortest


def flags(setting: str, method: str, rho: float | None, share: float = 1.0, more: str = "") -> str:
    """All that a method's runs in a setting are told, with a share of the recipe's epochs; `more` at the end."""
    of, what = SETTINGS[setting], METHODS[method]
    parts = [what.flags, of.flags]
    if what.stretch is None:
        parts.append(of.base_flags)
    epochs = what.epochs * share
    if epochs != 1:
        parts.append(f"--num_train_epochs {epochs * recipe(setting)['num_train_epochs']:g}")
    if rho is not None:
        parts.append(f"--rho {rho:g}")
    parts.append(more)
    return " ".join(filter(None, parts))


def recipe(setting: str) -> dict:
    of = SETTINGS[setting]
    return recipes.read(ROOT / "tasks" / of.task / "recipes" / f"{of.recipe}.yaml")


def grid(start: float, first: int, last: int) -> list[float]:
    """start·√2^i for i from first to last, to two digits."""
    return [float(f"{start * 2 ** (i / 2):.2g}") for i in range(first, last + 1)]


def extend(first: int, last: int, scores: Sequence[float], chance: float) -> tuple[int, int]:
    """
    The ends of the grid, moved on by one where the best score stands at one; of equal scores the shorter `rho`'s counts. To a shorter one
    too where none trains: no score reaches twice `chance`, a guess's.
    """
    best = first + scores.index(max(scores))
    if last - first + 1 < MOST_VALUES:
        if best == first or max(scores) < 2 * chance:
            return first - 1, last
        if best == last:
            return first, last + 1
    return first, last


def read_kept(setting: str, path: Path, split: str, told: Callable[[str, dict], str | None]) -> dict[str, list[dict]]:
    """
    The runs in a file of results/, if they are of the setting.

    Args:
        split (`str`): of which images or sentences they have scores.
        told (`Callable`): the flags of a name's runs, by the name and a run; `None` if the study does not know them.

    Raises:
        `ValueError`: a run is of another recipe, data set, model or method than the setting and its name say, or has no score.
    """
    of, recipes_own = SETTINGS[setting], fixed(setting)
    found = read(path)
    put_back = f"put the file of {setting} back, or make it anew"
    for name, runs in found.items():
        for one in runs:
            place = f"{path}: {name}, seed {one['seed']}"
            named = recipe_of(one.get("command", ()))
            if named not in (None, of.recipe):
                raise ValueError(f"{place} is of the recipe {named}, and {setting} is of {of.recipe}: {put_back}.")
            flags_of = shlex.split(told(name, one) or "")
            check_asked(place, f"{name} in {setting}", asked(flags_of, recipes_own), one, put_back)
    check_metric(found, of.metrics[0], split, path)
    return found


def fixed(setting: str) -> dict[str, Any]:
    """What no flag for all runs may change: the recipe's model and data, and what settings of one recipe differ in."""
    vary = [name for of in SETTINGS.values() for name in fields(shlex.split(of.flags))]
    # A text's data set is a folder, wherever it lies.
    names = ["model", *vary, *(["dataset"] if SETTINGS[setting].task == "image_classification" else [])]
    return {name: value for name, value in recipe(setting).items() if name in names}


def own(setting: str, told: str) -> str:
    """What a run of the setting is told and what is the setting's, which `--flags` must leave alone."""
    return " ".join([told, *(f"--{name}" for name in fixed(setting))])


def results(setting: str) -> dict[str, list[dict]]:
    """The results of each method of the study, from results/; empty if there are none."""

    def told(name: str, run: dict) -> str | None:
        return flags(setting, name, None) if name in METHODS else None

    of, found = SETTINGS[setting], {}
    if of.earlier is not None:
        path = ROOT / "results" / f"{of.earlier}.json"
        earlier = read_kept(setting, path, "test", lambda name, run: told(name.replace("sgd", "base"), run))
        found.update({name.replace("sgd", "base"): runs for name, runs in earlier.items()})
    path = ROOT / "results" / f"{setting}.json"
    if path.is_file():
        found.update(read_kept(setting, path, "test", told))
    return {method: found[method] for method in METHODS if method in found}


def check_methods(setting: str, found: Mapping[str, Any], methods: Iterable[str]) -> None:
    """
    Raises:
        `ValueError`: a setting lacks the results of a method that others are compared with.
    """
    for method in methods:
        if method not in found:
            raise ValueError(
                f"{ROOT / 'results' / setting}.json has no run of {method}, which others are compared with: scripts/run study {setting} "
                f"--methods {method} makes them."
            )


def tuning_files(setting: str) -> list[Path]:
    return [ROOT / "results" / f"{name}-tuning.json" for name in (SETTINGS[setting].earlier, setting) if name]


def is_tuned(setting: str) -> bool:
    return any(file.is_file() for file in tuning_files(setting))


def tuning(setting: str) -> dict[str, dict[float, list[float]]]:
    """
    What the tuning gave: the validation scores of the seeds for each `rho`, by method.

    Raises:
        `ValueError`: the setting has not been tuned.
    """

    def told(name: str, run: dict) -> str | None:
        method, _, rho = name.rpartition("-rho-")
        return f"{flags(setting, method, None)} --rho {rho}" if method in METHODS else None

    score, files = SETTINGS[setting].metrics[0], tuning_files(setting)
    if not is_tuned(setting):
        raise ValueError(f"There is no {files[-1].relative_to(ROOT)}: scripts/run study {setting} makes it.")
    found: dict[str, dict[float, list[float]]] = {}
    for file in filter(Path.is_file, files):
        for name, runs in read_kept(setting, file, "validation", told).items():
            # The older studies' names are the task's, with numbers after them.
            method = name.rpartition("-rho-")[0] or runs[0]["method"]
            if method in METHODS:
                scores = found.setdefault(method, {})
                scores[runs[0]["arguments"]["rho"]] = [run["metrics"]["validation"][score] for run in runs]
    return {method: dict(sorted(scores.items())) for method, scores in found.items()}


def best_rho(scores: Mapping[float, Sequence[float]]) -> float:
    """Of the highest mean; of equal ones the shortest."""
    return max(sorted(scores), key=lambda rho: statistics.mean(scores[rho]))


def chosen(setting: str) -> dict[str, float]:
    """The `rho` of each method that has one, as the tuning chose it."""
    return {method: best_rho(scores) for method, scores in tuning(setting).items()}


def tune(setting: str, method: str, jobs: int, more: str = "") -> None:
    """Trains until the best `rho` stands inside its grid; `more` are flags for all runs."""
    of, start = SETTINGS[setting], METHODS[method].stretch * recipe(setting)["rho"]
    score = of.metrics[0]
    ends, before = (-1, 1), None
    while ends != before:
        before = ends
        runs = {
            rho: [
                Run(
                    of.task,
                    of.recipe,
                    f"{setting}-tuning",
                    f"{method}-rho-{rho:g}",
                    seed,
                    flags(setting, method, rho, more=f"{QUICK} {more}".rstrip()),
                )
                for seed in of.tuning_seeds
            ]
            for rho in grid(start, *ends)
        }
        run_or_exit([run for seeds in runs.values() for run in seeds], jobs)
        found = {
            f"{method}-rho-{rho:g}": [FinishedRun.load(ROOT / run.folder).result for run in seeds]
            for rho, seeds in runs.items()
        }
        check_metric(found, score, "validation")
        scores = [
            statistics.mean(result["metrics"]["validation"][score] for result in results) for results in found.values()
        ]
        ends = extend(*ends, scores, of.chance)


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument(
        "--seeds", nargs="+", type=parse_seed, help="default: 0, 1 and so on, as many as the setting has"
    )
    parser.add_argument("--tune_only", action="store_true")
    parser.add_argument(
        "--flags", type=parse_flags, default="", help='for all runs, such as --flags="--data_dir DATA/cifar10"'
    )
    parser.add_argument(
        "--jobs", type=parse_count, default=1, help="runs at a time; with more than one, each has one thread"
    )
    args = parser.parse_args(argv)
    check_once(parser, methods=args.methods, seeds=args.seeds)
    of = SETTINGS[args.setting]
    for method in args.methods:
        refuse_overridden(own(args.setting, flags(args.setting, method, 1)), args.flags)
    known = chosen(args.setting) if is_tuned(args.setting) and not args.tune_only else {}
    for method in args.methods:
        if METHODS[method].stretch is not None and method not in known:
            tune(args.setting, method, args.jobs, args.flags)
            keep(ROOT / "runs" / f"{args.setting}-tuning")
    if args.tune_only:
        return
    rhos = chosen(args.setting)
    seeds = range(of.seeds) if args.seeds is None else args.seeds
    # Seeds outside, methods inside: an interrupted comparison holds pairs.
    for seed in seeds:
        run_or_exit(
            [
                Run(
                    of.task,
                    of.recipe,
                    args.setting,
                    method,
                    seed,
                    flags(args.setting, method, rhos.get(method), more=args.flags),
                )
                for method in args.methods
            ],
            args.jobs,
        )
        keep(ROOT / "runs" / args.setting)
    found = results(args.setting)
    for metric in of.metrics:
        print(
            to_markdown(make_cells(make_rows(found, metric), metric, [m for m in ("base", "base-2x") if m in found]))
        )


if __name__ == "__main__":
    run(main)
