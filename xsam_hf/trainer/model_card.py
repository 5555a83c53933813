"""The method in the model card that the Trainer writes and `push_to_hub` publishes: tags, a section with the settings, the citation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..arguments import XSAMArguments


TAGS = ("xsam", "sharpness-aware")
SAM = "[SAM](https://arxiv.org/abs/2010.01412) (Foret et al., 2021)"
XSAM = "[XSAM](https://arxiv.org/abs/2603.10048) (Chen and Zhou, ICLR 2026)"
CITATION = """\
@inproceedings{chen2026revisiting,
  title = {Revisiting Sharpness-Aware Minimization: A More Faithful and Effective Implementation},
  author = {Chen, Jianlong and Zhou, Zhiming},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  url = {https://openreview.net/forum?id=qTRqmMOOrH},
}"""


def with_tags(tags: str | Iterable[str] | None) -> list[str]:
    """Some tags and ours, each once."""
    given = [tags] if isinstance(tags, str) else tags or []
    return list(dict.fromkeys([*given, *TAGS]))


def add_section(card: Path, arguments: XSAMArguments) -> None:
    """
    Appends the method to a model card: what it does, its settings, and the paper's citation.

    Args:
        card (`Path`): the file.
        arguments ([`XSAMArguments`]): their fields become a table.
    """
    from .. import __version__  # which is not there yet while the package is imported

    plain = arguments.perturbation == "sam" and arguments.direction == "arc" and arguments.ascent_fraction == 1
    method = f"{SAM}, the setting `alpha=1` of {XSAM}" if plain and arguments.alpha == 1 else XSAM
    lines = [
        "",
        "## XSAM",
        "",
        f"Trained with {method}, by `xsam_hf` {__version__}: each update looks at the loss around the weights, `rho` away from them, and "
        "the optimizer steps away from where it is high. The settings:",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in asdict(arguments).items()),
        "",
        "```bibtex",
        CITATION,
        "```",
        "",
    ]
    card.write_text(card.read_text(encoding="utf-8") + "\n".join(lines), encoding="utf-8")
