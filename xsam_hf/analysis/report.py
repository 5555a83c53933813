"""Tables of what was measured, and one self-contained page that compares checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from . import pictures
from .curves import Curves
from .measures import MEASURES
from .page import make_page, paragraphs, to_figure, to_table
from .svg import draw


def summarise(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """
    A table with a row for each checkpoint, the head first.

    Args:
        results (mapping): by measure, then checkpoint; measures that were not taken have no columns.
    """
    rows: dict[str, dict[str, str]] = {}
    for measure, found in results.items():
        for name, result in found.items():
            rows.setdefault(name, {}).update(_columns(measure, result))
    head = list(dict.fromkeys(column for row in rows.values() for column in row))
    return [["checkpoint", *head], *([name, *(row.get(column, "") for column in head)] for name, row in rows.items())]


def _columns(measure: str, result: Any) -> dict[str, str]:
    if measure == "arc":
        middle = result.searches[len(result.searches) // 2]
        alpha = "none: noise or flat" if middle.alpha is None else f"{middle.alpha:.2f}"
        return {f"α* at r = {middle.rho_max:.3g}": alpha, "ψ, degrees": f"{np.degrees(middle.angle):.1f}"}
    if measure == "gain":
        rho, distance = len(result.rhos) // 2, result.distances.index(sorted(result.distances)[-2])
        at, n = f"at r = {result.distances[distance]:.3g}, batches", len(result.loss)
        return {
            f"{higher} higher than {lower} {at}": f"{round(n * result.share(*names)[rho, distance])} of {n}"
            for higher, lower, names in (("g₁", "g₀", ("last", "first")), ("v(α*)", "g₁", ("best", "last")))
        }
    if measure == "hessian":
        trace = "" if result.trace is None else f"{result.trace:.4g} ± {result.trace_error:.2g}"
        ratio = f"{result.ratio:.3g}" if result.eigenvalues[:5][-1] > 0 else "–"
        return {"λ₁": f"{result.eigenvalues[0]:.4g}", "λ₁/λ₅": ratio, "trace": trace}
    if measure == "sharpness":
        average, elements = result.average, result.elementwise
        return {
            "loss": f"{average.loss:.4g}",
            f"average sharpness, filters, r = {average.radii[-1]:.3g}": f"{average.mean[-1]:.4g} ± {average.error[-1]:.2g}",
            f"elements, r = {elements.radii[-1]:.3g}": f"{elements.mean[-1]:.4g} ± {elements.error[-1]:.2g}",
            "ascent sharpness": f"{result.ascent:.4g}",
            "m-sharpness": f"{np.mean(result.by_batch):.4g}",
        }
    return {}


def to_text(cells: Sequence[Sequence[str]]) -> str:
    """The table as Markdown; with few rows, a column is a line."""
    lines = [list(line) for line in zip(*cells, strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def make_report(
    results: Mapping[str, Mapping[str, Any]], curves: Mapping[str, Curves], command: str, facts: Mapping[str, Any]
) -> str:
    """
    The page.

    Args:
        results (mapping): by measure, then checkpoint.
        curves (mapping): what the checkpoints' runs logged, by name; may be empty.
        command (`str`): as it was given.
        facts (mapping): what else a reader needs to get the same numbers.
    """
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    lines = [list(line) for line in zip(*summarise(results), strict=True)]
    figures = [
        to_figure(_HEADINGS[measure], draw(MEASURES[measure].draw, found), MEASURES[measure].caption)
        for measure, found in results.items()
    ]
    if any(curves.values()):
        caption = (
            "What the runs logged: position on the arc, angle ψ in radians, norms of the first and the last gradient."
        )
        figures.append(to_figure("Over training", draw(pictures.draw_curves, curves), caption))
    return make_page(
        "Loss surfaces: " + ", ".join(names),
        "Measured by xsam_hf.analysis, all checkpoints on the same batches and random directions.",
        [
            f'<h2>In figures</h2>\n<div class="scroll">{to_table(lines)}</div>',
            f'<p class="soft">{_NOTE}</p>',
            *figures,
            "<h2>How this was made</h2>",
            paragraphs(["; ".join(f"{name}: {value}" for name, value in facts.items())]),
            f"<pre>{escape(command)}</pre>",
        ],
    )


_HEADINGS = {
    "arc": "Along the arc",
    "plane": "The plane of the two gradients",
    "gain": "Which direction leads higher",
    "hessian": "The top of the Hessian's spectrum",
    "sharpness": "Average sharpness",
    "landscape": "The landscape",
}
_NOTE = (
    "λ: eigenvalues of the Hessian; trace by Hutch++ ± its standard error. Average sharpness: mean rise of the loss over random "
    "directions ± its standard error, scaled filter by filter or element by element. Ascent sharpness: the highest rise that five steps of "
    "gradient ascent find within ρ. m-sharpness: the mean over batches of the rise at ρ along a batch's own gradient. ρ_max is twice ρ "
    "unless it was given; the arc is drawn at half of it, at it and at twice it, the gains for half of ρ, ρ and twice ρ. Where a classifier's "
    "loss is near 0 its Hessian is small in itself, wrong labels or not, and the loss may yet rise fast a step away: where losses differ λ "
    "and the trace rank nothing."
)
