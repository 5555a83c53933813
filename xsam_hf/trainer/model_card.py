"""The method's section in the model card that the Trainer writes and `push_to_hub` publishes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..arguments import XSAMArguments


def add_section(card: Path, arguments: XSAMArguments) -> None:
    """Appends a table of the method's fields to a model card."""
    lines = [
        "",
        "## XSAM",
        "",
        "Trained by `xsam_hf`, explicit sharpness-aware minimization (XSAM, ICLR 2026), with:",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in asdict(arguments).items()),
        "",
    ]
    card.write_text(card.read_text(encoding="utf-8") + "\n".join(lines), encoding="utf-8")
