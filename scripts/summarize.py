"""
Keeps the results of a group of runs in one JSON file and prints them as a Markdown table: mean ± std over the seeds, paired
differences to baselines with half of their 95 % interval, passes, seconds.

    scripts/run summarize runs/digits                                   # writes results/digits.json
    scripts/run summarize results/digits.json --baselines sgd-2x sam    # the table again, from the file

What all runs have in common (versions, most arguments) stands in the file once. A path is looked for where you are, then in the
root of the repository.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.asked import asked, check_asked, check_folder, recipe_of
from scripts.group import (
    check_corrupted,
    check_corruptions,
    check_metric,
    check_numbers,
    check_one_method,
    check_one_table,
    load_group,
)
from scripts.run_flags import check_once
from scripts.table import make_cells, make_rows, to_markdown
from tasks.command import Parser, run, sentence
from tasks.files import write_whole
from tasks.secret import without_secrets


ROOT = Path(__file__).resolve().parent.parent


def common_part(rows: Sequence[Mapping]) -> dict:
    """What stands in every one of some mappings, nested ones included."""
    first, others = rows[0], rows[1:]
    common = {}
    for key, value in first.items():
        if all(row.get(key) == value for row in others):
            common[key] = value
        elif isinstance(value, dict) and all(isinstance(row.get(key), dict) for row in others):
            common[key] = common_part([row[key] for row in rows])
    return {key: value for key, value in common.items() if value != {}}


def without(row: Mapping, common: Mapping) -> dict:
    """A mapping without what it has in common with others."""
    rest = {}
    for key, value in row.items():
        if isinstance(value, dict) and key in common:
            value = without(value, common[key])
            if not value:
                continue
        elif key in common:
            continue
        rest[key] = value
    return rest


def merged(common: Mapping, row: Mapping) -> dict:
    """The inverse of `without`."""
    whole = dict(common)
    for key, value in row.items():
        nested = isinstance(value, dict) and isinstance(common.get(key), dict)
        whole[key] = merged(common[key], value) if nested else value
    return whole


def collect(group: Path) -> dict[str, list[dict]]:
    """
    The whole results of a group's finished runs, by method.

    Raises:
        `ValueError`: see [`~scripts.group.load_group`].
    """
    found, unfinished = load_group(group)
    if unfinished:
        print(f"Not finished, and so left out: {', '.join(unfinished)}.\n")
    return {
        name: [
            without_secrets({"name": name, "command": r.command, **r.result})
            | ({"corruptions": r.corruptions} if r.corruptions else {})
            for r in seeds
        ]
        for name, seeds in found.items()
    }


def keep(group: Path) -> None:
    """
    Adds the finished runs of a folder of runs/ to the file of the same name in results/, in place of those of the same method and seed.

    How the model of a run scored on corrupted images stays, if the new run has the same scores on the others.

    Raises:
        `ValueError`: see `collect`; or the file's runs do not belong into one table with these.
    """
    path = file_of(group)
    write(_added(collect(group), read(path) if path.exists() else {}), path)


def _added(found: Mapping[str, Sequence[dict]], kept: Mapping[str, Sequence[dict]]) -> dict[str, list[dict]]:
    results = {name: [*runs] for name, runs in kept.items()}
    for name, runs in found.items():
        by_seed = {result["seed"]: result for result in results.get(name, [])}
        for result in runs:
            old = by_seed.get(result["seed"], {})
            if "corruptions" in old and old["metrics"] == result["metrics"]:
                result = {"corruptions": old["corruptions"], **result}
            by_seed[result["seed"]] = result
        results[name] = [by_seed[seed] for seed in sorted(by_seed)]
    _check_together({name: [(f"{name}, seed {run['seed']},", run) for run in runs] for name, runs in results.items()})
    return results


def _check_together(methods: Mapping[str, Sequence[tuple[str, dict]]]) -> None:
    """Refuses runs, of each method with where they are, that [`~scripts.group.load_group`] would refuse in a folder."""
    for runs in methods.values():
        check_one_method([place for place, _ in runs], [run for _, run in runs])
    every = [of for runs in methods.values() for of in runs]
    check_one_table([(place, recipe_of(run.get("command", [])), run) for place, run in every])
    check_corrupted((place, run.get("corruptions", {})) for place, run in every)


def _kept(group: Path, found: Mapping[str, Sequence[dict]]) -> dict[str, list[dict]]:
    """
    What the group's file in results/ holds, if all of it is in the group too.

    Raises:
        `ValueError`: it holds a run that the group lacks, and a table of the group alone would be written over it.
    """
    path = file_of(group)
    kept = read(path) if path.exists() else {}
    there = {(name, run["seed"]) for name, runs in found.items() for run in runs}
    lacking = [
        f"{name}, seed {run['seed']}"
        for name, runs in kept.items()
        for run in runs
        if (name, run["seed"]) not in there
    ]
    if lacking:
        raise ValueError(
            f"{path} holds {lacking[0]}, and {group} does not ({len(lacking)} such runs in all), which the new table would delete: "
            "rename the folder, after which the file is named, or move the file away."
        )
    return kept


def file_of(group: Path) -> Path:
    return ROOT / "results" / f"{group.resolve().name}.json"


def write(results: Mapping[str, Sequence[dict]], path: Path) -> None:
    """Writes runs by method as one object: `common`, and `runs` with what is special about each; `read` reads it."""
    runs = [result for seeds in results.values() for result in seeds]
    common = common_part(runs) if len(runs) > 1 else {}
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"common": common, "runs": [without(run, common) for run in runs]}, indent=1) + "\n")


def read(path: Path) -> dict[str, list[dict]]:
    """
    The whole results of each method in a file that `write` made.

    Raises:
        `ValueError`: it is no such file; a run is not of what its command asks for, or stands under another name; or two do not
            belong together, as in a folder ([`~scripts.group.load_group`]).
    """
    results: dict[str, list[dict]] = {}
    try:
        kept = json.loads(path.read_bytes())
        for row in kept["runs"]:
            run = check_numbers(merged(kept["common"], row))
            command = run.get("command", [])  # which some older ones lack
            if not (isinstance(command, list) and all(isinstance(part, str) for part in command)):
                raise ValueError(f"its command is {command!r}, and a list of words is expected")
            if "corruptions" in run:
                check_corruptions(run["corruptions"])
            results.setdefault(run["name"], []).append(run)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file that summarize wrote: {sentence(error)}.") from error
    if not results:
        raise ValueError(f"{path} holds no runs.")
    methods = {name: [(f"{path}: {name}, seed {run['seed']}", run) for run in runs] for name, runs in results.items()}
    for name, runs in methods.items():
        for place, run in runs:
            command = run.get("command", [])
            check_folder(place, Path(name, f"seed-{run['seed']}"), command, "its name was changed, put it back")
            check_asked(place, "its command", asked(command), run, "it was changed, put it back")
    _check_together(methods)
    return results


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("source", type=Path, help="a folder of runs/, or a file of results/")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--baselines", nargs="+", default=[], metavar="NAME", help="methods to take differences to")
    args = parser.parse_args(argv)
    check_once(parser, baselines=args.baselines)
    source = next((path for path in (args.source, ROOT / args.source) if path.exists()), None)
    if source is None:
        raise ValueError(
            f"There is no {args.source}, here or in {ROOT}: give a folder of runs/, or a file of results/."
        )
    results = collect(source) if source.is_dir() else read(source)
    check_metric(results, args.metric, args.split, source)
    rows = make_rows(results, args.metric, args.split)
    names = [row.name for row in rows]
    if missing := [name for name in args.baselines if name not in names]:
        raise ValueError(f"There is no run of the baseline {', '.join(missing)}: choose among {', '.join(names)}.")
    table = to_markdown(make_cells(rows, args.metric, args.baselines, args.split))
    if source.is_dir():
        write(_added(results, _kept(source, results)), file_of(source))
    print(table)
    if rows[0].seconds is None:
        print("\nSeconds are left out: these runs were not timed on one device with one torch and as many threads.")


if __name__ == "__main__":
    run(main)
