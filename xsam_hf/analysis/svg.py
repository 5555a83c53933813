"""Figures as SVG that is the same for the same numbers: as files, and as elements of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure


SALT: Any = {"svg.hashsalt": "xsam_hf"}  # of the names of parts, which are random otherwise
# Okabe and Ito's colours, which colour-blind readers can tell apart, the palest two left out.
COLORS = ["#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"]
# Stands for the colour of the page's text, which is light in dark mode, until the figure is part of the page.
TEXT_COLOR = "#010203"
STYLE: Any = {
    "svg.fonttype": "none",
    **SALT,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"], TEXT_COLOR
    ),
}


def make(columns: int = 1, rows: int = 1, **size: Any) -> tuple[Figure, Any]:
    """A white figure and its axes, an array of them if there are several; `size` is matplotlib's (`figsize`, `width_ratios`)."""
    figure = Figure(figsize=size.pop("figsize"), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, **size)


def save(figure: Figure, file: Path) -> None:
    """Writes a figure without its date."""
    with matplotlib.rc_context(SALT):
        figure.savefig(file, format="svg", metadata={"Date": None})


def write(plot: Callable[..., Figure], *arguments, file: Path) -> None:
    """Draws a figure in the style of pages, on white and with its letters as shapes, into a file of its own."""
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path", "figure.facecolor": "white"}):
        save(plot(*arguments), file)


def draw(plot: Callable[..., Figure], *arguments) -> str:
    """A figure as an element of the page: in the page's text colour, without a header and without addresses."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        plot(*arguments).savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :]).replace(TEXT_COLOR, "currentColor")
