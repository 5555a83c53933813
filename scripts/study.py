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

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.group import FinishedRun, check_metric
from scripts.run_flags import check_once, parse_count, parse_flags, parse_seed, refuse_overridden
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


def results(setting: str) -> dict[str, list[dict]]:
    """The results of each method of the study, from results/; empty if there are none."""
    of, found = SETTINGS[setting], {}
    if of.earlier is not None:
        for name, runs in read(ROOT / "results" / f"{of.earlier}.json").items():
            found[name.replace("sgd", "base")] = runs
    path = ROOT / "results" / f"{setting}.json"
    if path.is_file():
        found.update(read(path))
    check_metric(found, of.metrics[0], "test")
    return {method: found[method] for method in METHODS if method in found}


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
    score, files = SETTINGS[setting].metrics[0], tuning_files(setting)
    if not is_tuned(setting):
        raise ValueError(f"There is no {files[-1].relative_to(ROOT)}: scripts/run study {setting} makes it.")
    found: dict[str, dict[float, list[float]]] = {}
    for file in filter(Path.is_file, files):
        results = read(file)
        check_metric(results, score, "validation")
        for name, runs in results.items():
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
        refuse_overridden(flags(args.setting, method, 1), args.flags)
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
