#!/usr/bin/env python
"""
Keeps the results of a group of runs in one JSON file and prints them as a Markdown table: mean ± std over the seeds, paired
differences to baselines with half of their 95 % interval, passes, seconds.

    scripts/summarize runs/digits                                   # writes results/digits.json
    scripts/summarize results/digits.json --baselines sgd-2x sam    # the table again, from the file

What all runs have in common (versions, most arguments) stands in the file once.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from group import load_group
from table import make_cells, make_rows, to_markdown


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


def collect(group: Path) -> dict:
    """The finished runs of a group as one object: `common`, and `runs` with what is special about each."""
    found, unfinished = load_group(group)
    if not found:
        raise SystemExit(f"There is no finished run in {group}.")
    if unfinished:
        print(f"Not finished, and so left out: {', '.join(unfinished)}.\n")
    runs = [{"name": name, "command": run.command, **run.result} for name, seeds in found.items() for run in seeds]
    common = common_part(runs) if len(runs) > 1 else {}
    return {"common": common, "runs": [without(run, common) for run in runs]}


def read(path: Path) -> dict[str, list[dict]]:
    """The whole results of each method in a file that `collect` made."""
    kept = json.loads(path.read_text())
    results: dict[str, list[dict]] = {}
    for row in kept["runs"]:
        run = merged(kept["common"], row)
        results.setdefault(run["name"], []).append(run)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of runs/, or a file of results/")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--baselines", nargs="+", default=[], metavar="NAME", help="methods to take differences to")
    args = parser.parse_args()
    path = args.source
    if args.source.is_dir():
        path = ROOT / "results" / f"{args.source.resolve().name}.json"
        content = json.dumps(collect(args.source), indent=1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content + "\n")
    elif not args.source.is_file():
        parser.error(f"there is no {args.source}")
    results = read(path)
    if missing := [name for name in args.baselines if name not in results]:
        parser.error(f"no run of the baseline {', '.join(missing)}")
    metrics = next(iter(results.values()))[0]["metrics"][args.split]
    if args.metric not in metrics:
        parser.error(f"there is no metric {args.metric}: choose one of {', '.join(metrics)}")
    rows = make_rows(results, args.metric, args.split)
    print(to_markdown(make_cells(rows, args.metric, args.baselines, args.split)))


if __name__ == "__main__":
    main()
