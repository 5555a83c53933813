"""
Keeps what `python -m xsam_hf.analysis` found at the ends of a study's runs in one file of results/; its table is in RESULTS.md.

    for seed in 0 1 2; do for measure in hessian gain sharpness; do
        python -m xsam_hf.analysis $measure base=... sam=... xsam=... stale-xsam=... --output_dir runs/seen-$seed
    done; done
    scripts/run surfaces digits-noise 0=runs/seen-0 1=runs/seen-1 2=runs/seen-2     # writes results/digits-noise-surfaces.json
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts import study
from scripts.run_seeds import ROOT
from scripts.table import Row, paired_difference, to_markdown
from tasks.command import Parser, run, sentence
from tasks.files import write_whole


METHODS = ("base", "sam", "xsam", "stale-xsam")
RATIOS = (("sam", "base"), ("xsam", "sam"), ("xsam", "base"), ("stale-xsam", "base"))
MEASURES = ("hessian", "gain", "sharpness")
RHO = 1  # the place of the ascent's length among those that `gain` takes, and below of twice this length among the distances
TWICE_RHO = 2
Found = dict[str, dict[str, dict[str, dict]]]  # by seed, method and measure


def path_of(setting: str) -> Path:
    return ROOT / "results" / f"{setting}-surfaces.json"


def collect(setting: str, folders: Mapping[str, Path]) -> Found:
    """
    The results of all measures and methods, by seed.

    Raises:
        `ValueError`: a folder lacks one; it is another measure's, another run's, or the same as one of another place; or not all are
            taken with the same settings.
    """
    found: Found = {}
    weights: dict[str, tuple[str, str, Path]] = {}
    known_of: dict[tuple[str, str], tuple[str | None, Path]] = {}
    for seed, folder in folders.items():
        found[seed] = {}
        for method in METHODS:
            found[seed][method] = {}
            for measure in MEASURES:
                file = folder / method / f"{measure}.json"
                kept, of = _read(file, setting, seed, method, measure)
                found[seed][method][measure] = kept
                known = weights.setdefault(of or str(file), (seed, method, file))
                if known[:2] != (seed, method):
                    raise ValueError(
                        f"{known[2]} and {file} were taken of the same weights, and stand for {known[1]} of seed {known[0]} and {method} of "
                        f"seed {seed}: give each run its own folder."
                    )
                first = known_of.setdefault((seed, method), (of, file))
                if first[0] != of:
                    raise ValueError(
                        f"{file} was taken of other weights or batches than {first[1]}: take both of the same checkpoint."
                    )
                asked = found[next(iter(folders))][METHODS[0]][measure]["settings"]
                if kept["settings"] != asked:
                    raise ValueError(
                        f"{file} was taken with {kept['settings']}, and the first of its measure with {asked}: take one of them again."
                    )
    return found


def _read(file: Path, setting: str, seed: str, method: str, measure: str) -> tuple[dict[str, Any], str | None]:
    """What the analysis wrote: the result with its settings, and the fingerprint of the weights and batches."""
    if not file.is_file():
        raise ValueError(f"There is no {file}: python -m xsam_hf.analysis {measure} {method}=CHECKPOINT makes it.")
    try:
        kept = json.loads(file.read_bytes())
        found, of, checkpoint = (
            {"settings": kept["settings"], **kept["result"]},
            kept.get("of"),
            kept.get("checkpoint"),
        )
        if kept["measure"] != measure:
            raise ValueError(f"its measure is {kept['measure']}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not what python -m xsam_hf.analysis {measure} writes ({sentence(error)}): take it again."
        ) from error
    # As run_seeds and the study call the folders of runs; others may be called anything.
    place = re.search(r"(?:^|/)([^/]+)/([^/]+)/seed-(\d+)(?:/|$)", str(checkpoint))
    if place:
        group, name, number = place.groups()
        for ours, theirs, known in (
            (setting, group, study.SETTINGS),
            (method, name, study.METHODS),
            (seed, number, ()),
        ):
            if theirs != ours and (theirs in known or not known):
                raise ValueError(
                    f"{file} was taken of {checkpoint}, and stands for {method} of seed {seed} in {setting}."
                )
    return found, of


def measures(found: Mapping[str, Mapping]) -> dict[str, float]:
    """What one training ended with. Average sharpness is that over filters, at the longest of its radii."""
    values, average = found["hessian"]["eigenvalues"], found["sharpness"]["average"]
    return {
        "loss": average["loss"],
        "λ_1": values[0],
        "λ_1/λ_5": values[0] / values[4],
        "trace": found["hessian"]["trace"],
        f"average sharpness, r = {average['radii'][-1]:g}": statistics.mean(of[-1] for of in average["samples"]),
    }


def batches(found: Mapping[str, Mapping], higher: str, lower: str) -> tuple[int, int]:
    """In how many batches the loss is higher along one direction than along the other at twice the length of the ascent, and of how many."""
    along = [[batch[TWICE_RHO] for batch in found["gain"][name][RHO]] for name in (higher, lower)]
    return sum(one > other for one, other in zip(*along, strict=True)), len(along[0])


def section(setting: str) -> str:
    """
    A line for each measure: its value at each seed by method, and the ratios of methods, paired by seed: the geometric mean, and the 95 %
    interval of it by Student's t of the logarithms, where all values are above 0. Then in how many batches of all seeds one direction leads higher. Empty if there is
    no file.
    """
    path = path_of(setting)
    if not path.is_file():
        return ""
    try:
        return _section(setting, path)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} is not what scripts/run surfaces {setting} writes ({sentence(error)}): make it again."
        ) from error


def _section(setting: str, path: Path) -> str:
    kept = json.loads(path.read_bytes())
    if kept["setting"] != setting:
        raise ValueError(f"its setting is {kept['setting']}")
    found: Found = kept["seeds"]
    if not found:
        raise ValueError("it has no seed")
    lines = [["", *METHODS, *(f"{a} / {b}" for a, b in RATIOS)]]
    for name in measures(next(iter(found.values()))["base"]):
        of = {m: {int(seed): measures(methods[m])[name] for seed, methods in found.items()} for m in METHODS}
        values = [", ".join(f"{value:.3g}" for value in of[m].values()) for m in METHODS]
        lines.append([name, *values, *(_ratio(of[a], of[b]) for a, b in RATIOS)])
    for name, higher, lower in (("g₁ above g₀", "last", "first"), ("v(α\\*) above g₁", "best", "last")):
        counts = {m: [batches(methods[m], higher, lower) for methods in found.values()] for m in METHODS}
        shares = [f"{sum(won for won, _ in counts[m])} of {sum(of for _, of in counts[m])}" for m in METHODS]
        lines.append([f"{name}, batches", *shares, *("" for _ in RATIOS)])
    rho = next(iter(found.values()))["base"]["gain"]["settings"]["rho"]
    seeds = ", ".join(found)
    return (
        f"{study.SETTINGS[setting].title}: [results/{path.name}](results/{path.name}), seeds {seeds}, `--rho {rho:g}`:\n\n"
        f"{to_markdown(lines)}"
    )


def _ratio(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    if min(*values.values(), *others.values()) <= 0:
        return ""
    rows = [Row("", {seed: math.log(value) for seed, value in of.items()}, 0, 0, 0) for of in (values, others)]
    difference = paired_difference(*rows)
    assert difference is not None
    text = f"{math.exp(difference.mean):.2f}"
    if difference.margin is None:
        return text
    low, high = (math.exp(difference.mean + sign * difference.margin) for sign in (-1, 1))
    return f"{text} ({low:.2f} to {high:.2f})"


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("setting", choices=study.SETTINGS)
    parser.add_argument("folders", nargs="+", metavar="SEED=FOLDER")
    args = parser.parse_args(argv)
    pairs = []
    for text in args.folders:
        seed, equals, folder = text.partition("=")
        if not (equals and folder and seed.isdecimal() and str(int(seed)) == seed):
            parser.error(f"{text!r} should read SEED=FOLDER, the seed a whole number")
        pairs.append((seed, Path(folder)))
    if len(dict(pairs)) < len(pairs):
        parser.error("a seed is given twice")
    found = {"setting": args.setting, "seeds": collect(args.setting, dict(pairs))}
    write_whole(path_of(args.setting), json.dumps(found) + "\n")


if __name__ == "__main__":
    run(main)
