"""Figures as SVG files that are the same for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure


SALT = {"svg.hashsalt": "xsam_hf"}  # of the names of parts, which are random otherwise


def make(columns: int = 1, **size: Any) -> tuple[Figure, Any]:
    """A white figure and its axes, an array of them for several columns; `size` is matplotlib's (`figsize`, `width_ratios`)."""
    figure = Figure(figsize=size.pop("figsize"), layout="constrained", facecolor="white")
    return figure, figure.subplots(1, columns, **size)


def save(figure: Figure, file: Path) -> None:
    """Writes a figure without its date."""
    with matplotlib.rc_context(SALT):
        figure.savefig(file, format="svg", metadata={"Date": None})
