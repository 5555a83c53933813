"""
Loss surfaces, sharpness and spectra of checkpoints.

    python -m xsam_hf.analysis toy
    python -m xsam_hf.analysis hessian runs/mine/checkpoint-500 --data batches.safetensors
    python -m xsam_hf.analysis arc runs/mine/checkpoint-500 --trainer mine.py:build --rho 0.1
    python -m xsam_hf.analysis report SGD=runs/a/checkpoint-500 XSAM=runs/b/checkpoint-500 --trainer mine.py:build

arc         the loss along XSAM's arc, for three radii (Fig. 2 of the paper)
plane       the loss over the plane of the gradients at the weights and after the ascent (Fig. 1)
gain        the loss along either gradient, and the share of batches in which the second leads higher (Fig. 11, Proposition 1)
hessian     the highest eigenvalues of the Hessian and its trace (Table 16)
sharpness   average sharpness over random directions, and the highest rise within rho (Fig. 16)
landscape   the loss over two random directions, filter-normalised (Fig. 15)
toy         SGD, SAM and XSAM on the paper's function of two variables (Fig. 3a); takes no checkpoint
report      all of them and one page

Each writes a picture and its numbers into --output_dir. What is there already, of the same weights, batches, loss and settings, is not
measured again, so that Ctrl-C costs one measure. --data is a safetensors file of tensors by the names of the model's arguments, their first dimension
the examples; --trainer is FILE.py:FUNCTION, the function taking a checkpoint's path and returning a Trainer with its weights.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser


@dataclass
class AnalysisArguments:
    """What to measure, and where to write."""

    data: str | None = field(default=None, metadata={"help": "A safetensors file of the model's arguments."})
    trainer: str | None = field(default=None, metadata={"help": "FILE.py:FUNCTION, which returns a Trainer."})
    batch_size: int = field(default=32, metadata={"help": "Examples in a batch of --data."})
    batches: int = field(default=4, metadata={"help": "How many batches."})
    output_dir: str = field(default="analysis", metadata={"help": "The folder for pictures and numbers."})


def main(argv: Sequence[str]) -> None:
    """Runs one command."""
    try:
        from .measures import MEASURES, Settings
    except ModuleNotFoundError as error:  # matplotlib, for instance
        raise ImportError(f"{error}: the analysis needs its extra, `pip install 'xsam_hf[analysis]'`.") from error

    classes: Any = (AnalysisArguments, Settings)
    parser = HfArgumentParser(
        classes,
        prog="python -m xsam_hf.analysis",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=[*MEASURES, "toy", "report"], help="What to look at.")
    parser.add_argument("checkpoints", nargs="*", metavar="[NAME=]CHECKPOINT", help="Folders of models.")
    args, settings, rest, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if unknown:
        raise ValueError(f"There is no flag {unknown[0]}: --help lists all.")
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {folder}, a file: give a folder.")
    if rest.command == "toy":
        if rest.checkpoints:
            raise ValueError("`toy` is a function of two variables and takes no checkpoint.")
        _toy(folder)
    else:
        measures = list(MEASURES) if rest.command == "report" else [rest.command]
        _measure(measures, _named(rest.checkpoints), args, settings, folder, argv)


def _named(checkpoints: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in checkpoints]
    named = {(name if path else Path(name).name): path or name for name, _, path in pairs}
    if not named or "" in named:
        raise ValueError("Give one or more checkpoints, as FOLDER or NAME=FOLDER.")
    if unfit := [name for name in named if Path(name).name != name or name == ".." or Path(name).suffix == ".svg"]:
        raise ValueError(f"{unfit[0]!r} is to name a folder in the output folder: leave out `/`, `..` and `.svg`.")
    if len(named) < len(pairs):
        raise ValueError("Two checkpoints have the same name: give them others, NAME=FOLDER.")
    return named


def _measure(
    measures: Sequence[str], named: dict[str, str], args: AnalysisArguments, settings: Any, folder: Path, argv: Sequence[str]
) -> None:  # fmt: skip
    from . import svg
    from .built import check_built
    from .checkpoint import load
    from .curves import training_curves
    from .measures import MEASURES, take
    from .report import make_report, summarise, to_text

    results: dict[str, dict[str, Any]] = {measure: {} for measure in measures}
    earlier: dict[str, str] = {}
    for name, path in named.items():
        model, batches = load(path, args.data, args.trainer, args.batch_size, args.batches)
        if args.trainer is not None:
            check_built(model, args.trainer, path, earlier)
        folder.mkdir(parents=True, exist_ok=True)  # which may fail, and measures take long
        for measure in measures:
            print(f"{name}: {measure}", file=sys.stderr, flush=True)
            file = folder / name / f"{measure}.json"
            results[measure][name] = take(measure, file, model, batches, settings, path)
    for measure in measures:
        svg.write(MEASURES[measure].draw, results[measure], file=folder / f"{measure}.svg")
    print(to_text(summarise(results)))
    if len(measures) == 1:
        print(f"\n{folder / measures[0]}.svg")
        return
    curves = {name: training_curves(path) for name, path in named.items()}
    facts = {
        **{name: value for name, value in asdict(settings).items() if value is not None},
        "batches": args.batches,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    command = f"python -m xsam_hf.analysis {shlex.join(argv)}"
    page = folder / "report.html"
    page.write_text(make_report(results, curves, command, facts), encoding="utf-8")
    print(f"\n{page}")


def _toy(folder: Path) -> None:
    from . import pictures, svg, toy

    folder.mkdir(parents=True, exist_ok=True)  # which may fail, and this takes long
    descents = {name: toy.descend(toy.START, arguments) for name, arguments in toy.METHODS.items()}
    basins = toy.basins()
    found = basins.as_json()
    (folder / "toy.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    svg.write(pictures.draw_toy, descents, basins, file=folder / "toy.svg")
    for name, share in found["share"].items():
        print(f"{name}: {share:.1%} of {basins.flat[name].numel()} starts end nearer to the flat minimum")
    print(f"\n{folder / 'toy.svg'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
