"""The report's figures: matplotlib draws them, the page takes them as SVG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from scripts import svg
from scripts.group import FinishedRun


# Okabe and Ito's colours, which colour-blind readers can tell apart, the palest two left out.
COLORS = ["#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"]
# Stands for the colour of the page's text, which is light in dark mode, until the figure is part of the page.
TEXT_COLOR = "#010203"
STYLE = {
    "svg.fonttype": "none",
    **svg.SALT,
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


def plot_curves(runs: Mapping[str, Sequence[FinishedRun]], metric: str) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ["loss", f"eval_{metric}"], ["training loss", f"validation {metric}"], strict=True
    ):
        for number, (name, seeds) in enumerate(runs.items()):
            for run in seeds:
                if run.history:
                    label_once = name if run is seeds[0] else None
                    panel.plot(
                        *run.curve(key), color=COLORS[number % len(COLORS)], lw=1.3, alpha=0.8, label=label_once
                    )
        panel.set(xlabel="backward passes", ylabel=label)
    if metric.endswith("accuracy"):
        panels[1].yaxis.set_major_formatter(PercentFormatter(1))
    panels[0].set_yscale("log")
    panels[1].legend(loc="lower right")
    return figure


def plot_searches(runs: Mapping[str, Sequence[FinishedRun]]) -> Figure:
    """For each method that searched: the curves of its first seed, and the α of all seeds over the training."""
    # The ends of most colour maps vanish on white or on black.
    colors = LinearSegmentedColormap.from_list("progress", ["#56B4E9", "#8F6BC9", "#D55E00"])
    figure = Figure(figsize=(10, 3.8 * len(runs)), layout="constrained")
    for (left, right), (name, seeds) in zip(figure.subplots(len(runs), 2, squeeze=False), runs.items(), strict=True):
        searches = seeds[0].searches
        epochs = Normalize(searches[0]["epoch"], searches[-1]["epoch"])
        for search in (searches[i] for i in np.unique(np.linspace(0, len(searches) - 1, 8).round().astype(int))):
            alphas, losses = np.array(search["alphas"], dtype=float), np.array(search["losses"], dtype=float)
            finite = np.isfinite(losses)
            if not finite.any():
                continue
            # The first curve's range can be a hundred times a later one's: what the curves share is their shape.
            color, alphas, shape = colors(epochs(search["epoch"])), alphas[finite], losses[finite]
            shape = (shape - np.interp(1, alphas, shape)) / (np.ptp(shape) or 1)
            left.plot(alphas, shape, color=color, lw=1.3)
            left.plot(search["alpha"], np.interp(search["alpha"], alphas, shape), "o", color=color, ms=6)
        left.set(
            xlabel="α", ylabel="loss minus SAM's, share of range", title=f"{name}, seed {seeds[0].result['seed']}"
        )
        figure.colorbar(ScalarMappable(epochs, colors), ax=left, label="epoch").outline.set_visible(False)
        for run, marker in zip(seeds, "osD^v" * len(seeds), strict=False):
            points = [(search["epoch"], search["alpha"]) for search in run.searches]
            label = f"seed {run.result['seed']}"
            right.plot(
                *zip(*points, strict=True), color=TEXT_COLOR, alpha=0.6, marker=marker, ms=4, lw=0.8, label=label
            )
        right.set(xlabel="epoch", ylabel="chosen α", title=f"{name}, all seeds")
        right.axhline(1, color=TEXT_COLOR, lw=1, ls=":")
        right.legend()
    return figure


def draw(plot: Callable[..., Figure], *arguments) -> str:
    """A figure as an element of the page: in the page's text colour, without a header and without addresses."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        plot(*arguments).savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :]).replace(TEXT_COLOR, "currentColor")
