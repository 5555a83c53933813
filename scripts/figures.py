"""The report's figures: matplotlib draws them, the page takes them as SVG."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from scripts.group import FinishedRun
from scripts.table import counted_over
from xsam_hf.analysis.svg import COLORS, TEXT_COLOR


def plot_curves(runs: Mapping[str, Sequence[FinishedRun]], metric: str) -> Figure:
    """
    Two values over training, a line a seed: test score and wrong labels learnt where they were measured, else loss and validation.

    The axis is the backward passes made so far, in units of the cheapest run's, so that the methods end where their cost is.
    """
    logged = {key for seeds in runs.values() for run in seeds for entry in run.history for key in entry}
    learnt = f"eval_wrong_labels_{metric}"
    if learnt in logged:
        panels = {f"eval_test_{metric}": f"test {metric}", learnt: "wrong labels learnt"}
    else:
        panels = {"loss": "training loss", f"eval_{metric}": f"validation {metric}"}
    kind = f"backward{counted_over(run.result for seeds in runs.values() for run in seeds)}"
    unit = min(run.result["passes"][kind] for seeds in runs.values() for run in seeds)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, (name, seeds) in enumerate(runs.items()):
            curves = [run.curve(key, run.result["passes"][kind]) for run in seeds if run.history]
            for place, (passes, values) in enumerate(curves):
                axes.plot(
                    [passed / unit for passed in passes],
                    values,
                    color=COLORS[number % len(COLORS)],
                    lw=1.1,
                    alpha=0.75,
                    label=None if place else name,
                )
        axes.set(xlabel="backward passes, the cheapest training = 1", ylabel=label)
        if metric.endswith("accuracy") and key != "loss":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if key == "loss":
            axes.set_yscale("log")
        elif key != learnt:
            _cut_the_start(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
        for line in legend.get_lines():
            line.set(lw=3, alpha=1)
    return figure


def _cut_the_start(axes: Axes) -> None:
    """Leaves the axis to what the later halves of the lines are about: a first epoch can be far below."""
    later = [value for line in axes.lines for value in list(line.get_ydata())[len(line.get_ydata()) // 2 :]]
    if later:
        bottom = min(later) - (max(later) - min(later)) / 2
        axes.set_ylim(bottom=max(bottom, axes.get_ylim()[0]))


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
