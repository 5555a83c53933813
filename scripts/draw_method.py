"""
Draws docs/method.svg: one XSAM update on the quadratic L(x, y) = (x² + 10 y²)/2, computed by xsam_hf.

    scripts/run draw_method
"""

import math
from pathlib import Path

import numpy as np
import torch

from tasks.command import Parser, run
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient
from xsam_hf.analysis import svg


START, RHO, RHO_MAX = (1.0, 0.1), 0.5, 1.0


def loss(x, y):
    return (x**2 + 10 * y**2) / 2


def update():
    """One update from START: the points of the passes, their gradients, XSAM's gradient, and what the update saw."""
    weights, gradients, points = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64)), [], []

    def gradient():
        value = loss(*weights)
        value.backward()
        gradients.append(weights.grad.clone().numpy())
        points.append(weights.detach().clone().numpy())
        return value.detach()

    arguments = XSAMArguments(rho=RHO, rho_max=RHO_MAX)
    seen = xsam_gradient([weights], gradient, lambda: loss(*weights), arguments, XSAMState())
    return points, gradients, weights.grad.numpy(), seen


def arrow(axes, start, direction, length, color, label):
    end = start + length * direction / np.linalg.norm(direction)
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    )
    axes.plot([], [], color=color, lw=2, label=label)


def main(argv):
    Parser(description=__doc__).parse_args(argv)
    (theta, climbed), (g0, g1), direction, seen = update()
    search, psi = seen.search, float(seen.angle)
    figure, (plane, curve) = svg.make(2, figsize=(10, 4.4), width_ratios=[1.15, 1])

    x, y = np.meshgrid(np.linspace(0, 2.2, 60), np.linspace(-0.65, 1.3, 60))
    plane.contourf(x, y, loss(x, y), levels=16, cmap="YlOrBr", alpha=0.7)
    v0, v1 = g0 / np.linalg.norm(g0), g1 / np.linalg.norm(g1)
    arc = [(math.sin((1 - a) * psi) * v0 + math.sin(a * psi) * v1) / math.sin(psi) for a in search.alphas]
    plane.plot(*np.array([theta + RHO_MAX * v for v in arc]).T, "o-", color="black", ms=3, lw=1)
    plane.plot(
        [], [], "o-", color="black", ms=3, lw=1, label="probes $\\theta_0 + \\rho_{max} v(\\alpha)$, $\\alpha = 0 … 2$"
    )
    arrow(plane, theta, g0, RHO, "tab:blue", "ascent along $g_0$, length $\\rho$, to $\\theta_1$")
    arrow(plane, climbed, g1, RHO / 2, "tab:green", "$g_1$, the gradient at $\\theta_1$")
    plane.plot(
        *np.array([theta, theta + RHO_MAX * v1]).T,
        "--",
        color="tab:green",
        lw=1.5,
        label="SAM: $g_1$ used at $\\theta_0$",
    )
    arrow(plane, theta, direction, RHO_MAX, "tab:red", f"XSAM: $v(\\alpha^*)$, $\\alpha^* = {search.alpha:.1f}$")
    arrow(plane, theta, -direction, RHO / 2, "black", "the base optimizer steps away from it")
    for name, point, shift in (("$\\theta_0$", theta, (-16, -2)), ("$\\theta_1$", climbed, (8, -4))):
        plane.plot(*point, "o", color="black", ms=5)
        plane.annotate(name, point, xytext=shift, textcoords="offset points")
    plane.set(title="One update", aspect="equal", xticks=[], yticks=[])
    plane.legend(fontsize=7, loc="lower right")

    curve.plot(search.alphas, search.losses, "o-", color="black", ms=3)
    for alpha, color, name in (
        (0.0, "tab:blue", "$g_0$"),
        (1.0, "tab:green", "SAM"),
        (search.alpha, "tab:red", "XSAM"),
    ):
        height = search.losses[search.alphas.index(alpha)]
        curve.plot(alpha, height, "o", color=color, ms=8, label=f"{name}: $\\alpha = {alpha:.1f}$")
    curve.set(
        xlabel="$\\alpha$", ylabel="$L(\\theta_0 + \\rho_{max}\\, v(\\alpha))$", title="Its search: 21 forward passes"
    )
    curve.legend()
    svg.save(figure, Path(__file__).parents[1] / "docs" / "method.svg")


if __name__ == "__main__":
    run(main)
