"""The pictures: each takes results by name, such as SGD, SAM and XSAM, and shows them side by side; heights have one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from . import toy
from .arc import ArcProfile, DirectionGain
from .hessian import HessianSpectrum
from .plane import Plane
from .sharpness import AverageSharpness
from .svg import COLORS, TEXT_COLOR


FIRST, LAST, BEST = "#0072B2", "#009E73", "#D55E00"  # g_0, g_1 (SAM) and v(α*) (XSAM), in all pictures
_LOGGED = {
    "xsam/alpha": "position on the arc, α",
    "xsam/angle": "angle ψ, radians",
    "xsam/grad_norm_first": "$‖g_0‖$",
    "xsam/grad_norm_last": "$‖g_k‖$",
}
_MARKS: Any = {"alpha": 0.9, "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.6}}


def _panels(count: int, height: float = 3.8, rows: int = 1, share: bool = False) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(3.4 * count, 5), height * rows), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False, sharey=share)


def draw_arcs(profiles: Mapping[str, ArcProfile]) -> Figure:
    """Fig. 2: the rise of the loss along the arc, a line for each radius, with α* and SAM's and the ascent's directions."""
    figure, (panels,) = _panels(len(profiles), share=True)
    for axes, (name, profile) in zip(panels, profiles.items(), strict=True):
        for search, color in zip(profile.searches, COLORS * len(profile.searches), strict=False):
            rise = np.array(search.losses) - profile.loss
            axes.plot(search.alphas, rise, color=color, lw=1.6, label=f"r = {search.rho_max:.3g}")
            if search.alpha is not None:
                axes.plot(search.alpha, rise[search.alphas.index(search.alpha)], "o", color=color, ms=7)
        ascent = "$g_0$" if profile.ascent_steps == 1 else "$v_0$"
        for alpha, label in ((0, ascent), (1, "SAM")):
            axes.axvline(alpha, color=TEXT_COLOR, lw=0.8, ls=":")
            axes.annotate(label, (alpha, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
        axes.set_title(f"{name}, ρ = {profile.rho:.3g}", pad=18)
        axes.set(xlabel="position on the arc, α", ylabel="$L(θ_0 + r\\,v(α)) - L(θ_0)$")
        axes.legend(title="dot: α*", fontsize=8)
    return figure


def draw_planes(planes: Mapping[str, Plane]) -> Figure:
    """Fig. 1 and 5 to 10: the loss over the plane of an ascent, with its points, gradients and the circle of radius ρ_max."""
    figure, (panels,) = _panels(len(planes), height=4.2)
    for axes, (name, found) in zip(panels, planes.items(), strict=True):
        _contours(figure, axes, found, np.array(found.losses), "loss")
        assert found.radius is not None
        axes.add_patch(Circle((0, 0), found.radius, fill=False, ls="--", lw=1, color="black"))
        points = np.array(found.points)
        axes.plot(*points.T, "o-", color="black", ms=4, lw=1)
        for i, (point, gradient) in enumerate(zip(points, np.array(found.gradients), strict=True)):
            color = FIRST if i == 0 else LAST if i == len(points) - 1 else "grey"
            _arrow(axes, point, gradient * found.radius * 0.55, color)
            axes.annotate(f"$θ_{i}$", point, xytext=(-12, -11), textcoords="offset points", fontsize=9, **_MARKS)
        last = np.array(found.gradients[-1]) * found.radius
        axes.plot([0, last[0]], [0, last[1]], ":", color=LAST, lw=2)
        k = len(points) - 1
        axes.legend(
            handles=[
                Line2D([], [], color=FIRST, lw=2, label="$g_0$"),
                Line2D([], [], color=LAST, lw=2, label=f"$g_{k}$; dotted: used at $θ_0$"),
                Line2D([], [], color="black", lw=1, ls="--", label=f"$ρ_{{max}}$ = {found.radius:.3g}"),
            ],
            fontsize=7,
            loc="lower left",
            frameon=True,
            labelcolor="black",
            facecolor="white",
        )
        names = ("$g_0$", "$g_1$") if found.spanned_by == "gradients" else ("$v_0$", "$v_1$")
        axes.set(title=name, xlabel=f"along {names[0]}", ylabel=f"across, towards {names[1]}")
    return figure


def draw_landscapes(planes: Mapping[str, Plane]) -> Figure:
    """Fig. 15: the rise of the loss over two filter-normalised random directions, in the same colours for all."""
    figure, (panels,) = _panels(len(planes))
    rises = {name: np.array(found.losses) - found.loss for name, found in planes.items()}
    # One sharp checkpoint would leave the others white: what is above the scale has the darkest colour.
    heights = [rise[np.isfinite(rise)] for rise in rises.values()]
    top = float(np.median([height.max() for height in heights]))
    levels = np.linspace(min(min(height.min() for height in heights), 0), max(top, 1e-12), 15)
    for axes, (name, found) in zip(panels, planes.items(), strict=True):
        axes.set(title=name, xlabel="random direction 1, in filter norms", ylabel="random direction 2")
        _contours(figure if axes is panels[-1] else None, axes, found, rises[name], "$L - L(θ_0)$", levels)
        axes.plot(0, 0, "+", color="black", ms=9)
    return figure


def _contours(
    figure: Figure | None, axes: Axes, found: Plane, height: np.ndarray, label: str, levels: np.ndarray | int = 15
) -> None:
    extend: Any = "neither" if isinstance(levels, int) else "max"
    shown = np.ma.masked_invalid(height)
    filled = axes.contourf(found.x, found.y, shown, levels=levels, cmap="YlOrBr", alpha=0.85, extend=extend)
    axes.set(aspect="equal")
    axes.grid(False)
    if figure is not None:
        figure.colorbar(filled, ax=axes, label=label, shrink=0.75)


def _arrow(axes: Axes, start: np.ndarray, direction: np.ndarray, color: str) -> None:
    style: Any = {"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", tuple(start + direction), tuple(start), arrowprops=style)


def draw_gains(gains: Mapping[str, DirectionGain]) -> Figure:
    """Fig. 11 and 12: the mean rise of the loss over the distance, along g_0, g_1 and v(α*), a column for each ρ."""
    columns = max(len(gain.rhos) for gain in gains.values())
    figure, panels = _panels(columns, height=3.2, rows=len(gains), share=True)
    for row, (name, gain) in zip(panels, gains.items(), strict=True):
        for i, (axes, rho) in enumerate(zip(row, gain.rhos, strict=False)):
            for direction, color, label in (
                ("first", FIRST, "$g_0$"),
                ("last", LAST, "$g_1$ (SAM)"),
                ("best", BEST, "$v(α^*)$ (XSAM)"),
            ):
                axes.plot(gain.distances, gain.gain(direction)[i], "o-", ms=3, color=color, label=label)
            axes.set(title=f"{name}, ρ = {rho:.3g}", xlabel="distance r", ylabel="$L(θ_0 + r\\,v) - L(θ_0)$")
            axes.legend(fontsize=8)
    return figure


def draw_sharpness(found: Mapping[str, AverageSharpness]) -> Figure:
    """Fig. 16: average sharpness over the radius, ± its standard error, and over the number of directions."""
    figure, ((left, right),) = _panels(2)
    for (name, average), color in zip(found.items(), COLORS * len(found), strict=False):
        left.plot(average.radii, average.mean, "o-", ms=3, color=color, label=name)
        left.fill_between(average.radii, average.mean - average.error, average.mean + average.error, color=color, alpha=0.2, lw=0)  # fmt: skip
        right.plot(range(1, len(average.samples) + 1), average.convergence[:, -1], color=color, label=name)
    first = next(iter(found.values()))
    left.set(
        xlabel=f"radius r, as a share of each {first.normalisation}'s size",
        ylabel="mean of $L(θ_0 + r\\,d) - L(θ_0)$",
        title="Average sharpness ± its standard error",
    )
    right.set(xlabel="random directions", ylabel="mean so far", title=f"Its convergence at r = {first.radii[-1]:.3g}")
    left.legend(fontsize=8)
    return figure


def draw_spectra(found: Mapping[str, HessianSpectrum]) -> Figure:
    """Table 16: the highest eigenvalues of the Hessian."""
    figure, ((axes,),) = _panels(1, height=3.4)
    for (name, spectrum), color in zip(found.items(), COLORS * len(found), strict=False):
        values = spectrum.eigenvalues
        axes.plot(range(1, len(values) + 1), values, "o-", color=color, label=name)
    count = max(len(spectrum.eigenvalues) for spectrum in found.values())
    axes.set(xlabel="i", ylabel="eigenvalue $λ_i$ of the Hessian", xticks=range(1, count + 1))
    if min(min(spectrum.eigenvalues) for spectrum in found.values()) > 0:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def draw_curves(runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Fig. 13 and 14: what runs logged over training, a panel for each key; see [`training_curves`]. A run without any keeps its colour."""
    keys = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    columns = 2 if len(keys) > 1 else 1  # four in a row would be too small to read at the width of a page
    figure, grid = _panels(columns, height=2.8, rows=math.ceil(len(keys) / columns))
    for axes in grid.flat[len(keys) :]:
        axes.remove()
    for axes, key in zip(grid.flat, keys, strict=False):
        for (name, curves), color in zip(runs.items(), COLORS * len(runs), strict=False):
            if key in curves:
                axes.plot(*curves[key], color=color, lw=1.4, label=name)
        axes.set(xlabel="update", ylabel=_LOGGED.get(key, ""), title=key)
        axes.legend(fontsize=8)
    return figure


def draw_toy(trajectories: Mapping[str, toy.Trajectory], basins: toy.Basins) -> Figure:
    """Fig. 3a: descents over the contours of the test function; and the minimum that each start ends at."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1.5, 1])
    axes = figure.add_subplot(grid[0, :])
    mu, sigma = torch.linspace(-35, 35, 71, dtype=torch.float64), torch.linspace(3, 45, 71, dtype=torch.float64)
    surface = toy.loss(torch.stack(torch.meshgrid(mu, sigma, indexing="xy"), -1))
    filled = axes.contourf(
        mu, sigma, surface, levels=np.linspace(0.2, 2.0, 19), cmap="YlOrBr", alpha=0.8, extend="max"
    )
    figure.colorbar(filled, ax=axes, label="L(μ, σ)")
    colors = {"SGD": FIRST, "SAM": LAST, "XSAM": BEST}
    for name, descent in trajectories.items():
        points = descent.points
        axes.plot(*points.T, "-", color=colors[name], lw=1.6, label=name)
        axes.plot(*points[-1], "o", color=colors[name], ms=6)
    axes.plot(*next(iter(trajectories.values())).points[0], "k*", ms=10, label="start")
    for minimum, label in ((toy.SHARP, "sharp minimum"), (toy.FLAT, "flat minimum")):
        axes.plot(*minimum, "kx", ms=8)
        axes.annotate(label, minimum, xytext=(6, -14), textcoords="offset points", fontsize=9, **_MARKS)
    axes.set(xlabel="μ", ylabel="σ", title="Descents from one start; dots: where they end")
    axes.grid(False)
    axes.legend(fontsize=8, loc="lower left", frameon=True, labelcolor="black", facecolor="white")
    for i, (name, flat) in enumerate(basins.flat.items()):
        below = figure.add_subplot(grid[1, i])
        points = torch.cartesian_prod(basins.mu, basins.sigma)
        for value, color, label in (
            (1.0, BEST, "flat"),
            (0.0, FIRST, "sharp"),
            (None, "grey", "none: the descent left σ > 0"),
        ):
            chosen = flat.flatten().isnan() if value is None else flat.flatten() == value
            below.plot(*points[chosen].T, "s", color=color, ms=4, label=label)
        below.set(xlabel="μ of the start", ylabel="σ of the start", title=f"{name}: {basins.share(name):.1%} flat")
        below.grid(False)
    figure.legend(
        *below.get_legend_handles_labels(), loc="outside lower center", ncols=3, title="The minimum nearer to the end"
    )
    return figure
