"""
Keeps what `python -m xsam_hf.analysis hessian` found of several seeds in one file of results/; its table is in RESULTS.md.

    scripts/run spectra 0=runs/seen-0 1=runs/seen-1 2=runs/seen-2     # SEED=the --output_dir; writes results/digits-spectra.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.run_seeds import ROOT
from scripts.table import Row, paired_difference, to_markdown
from tasks.command import Parser, run
from tasks.files import write_whole


NAME = "digits-spectra"
METHODS = ("SGD", "SAM", "XSAM", "stale-XSAM")
RATIOS = (("SAM", "SGD"), ("XSAM", "SAM"), ("XSAM", "SGD"), ("stale-XSAM", "SGD"))
Spectra = dict[str, dict[str, dict]]  # by seed, then method


def collect(folders: Mapping[str, Path]) -> Spectra:
    """
    The results of all methods, by seed.

    Raises:
        `ValueError`: a folder lacks one.
    """
    found: Spectra = {}
    for seed, folder in folders.items():
        found[seed] = {}
        for method in METHODS:
            file = folder / method / "hessian.json"
            if not file.is_file():
                raise ValueError(
                    f"There is no {file}: python -m xsam_hf.analysis hessian {method}=CHECKPOINT makes it."
                )
            found[seed][method] = json.loads(file.read_bytes())["result"]
    return found


def measures(spectrum: Mapping) -> dict[str, float]:
    """λ_1, λ_1/λ_5 and the trace."""
    values = spectrum["eigenvalues"]
    return {"λ_1": values[0], "λ_1/λ_5": values[0] / values[4], "trace": spectrum["trace"]}


def section() -> str:
    """
    A line for each measure: its value at each seed by method, and the ratios of methods, paired by seed: the geometric mean, and the 95 %
    interval of it by Student's t of the logarithms. Empty if there is no file.
    """
    path = ROOT / "results" / f"{NAME}.json"
    if not path.is_file():
        return ""
    found: Spectra = json.loads(path.read_bytes())
    lines = [["", *METHODS, *(f"{a} / {b}" for a, b in RATIOS)]]
    for name in measures(next(iter(found.values()))["SGD"]):
        of = {m: {int(seed): measures(spectra[m])[name] for seed, spectra in found.items()} for m in METHODS}
        values = [", ".join(f"{value:.3g}" for value in of[m].values()) for m in METHODS]
        lines.append([name, *values, *(_ratio(of[a], of[b]) for a, b in RATIOS)])
    return to_markdown(lines)


def _ratio(values: Mapping[int, float], others: Mapping[int, float]) -> str:
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
    parser.add_argument("folders", nargs="+", metavar="SEED=FOLDER")
    args = parser.parse_args(argv)
    folders = {seed: Path(folder) for seed, _, folder in (text.partition("=") for text in args.folders)}
    path = ROOT / "results" / f"{NAME}.json"
    write_whole(path, json.dumps(collect(folders), indent=1) + "\n")


if __name__ == "__main__":
    run(main)
