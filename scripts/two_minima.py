"""
The paper's figure 3(a): paths of SGD, SAM and XSAM on a function of two parameters that has a sharp and a flat minimum, and where each
method ends up from a grid of starts.

    scripts/run two_minima      # writes results/two-minima.json and docs/two-minima.svg
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import torch

from scripts import svg
from scripts.run_seeds import ROOT
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient


# (μ, σ) of the two Gaussians, the scale of the distance from each, and its share (paper, section 5.1 and appendix D.1).
GAUSSIANS = (((20.0, 30.0), 1.8, 0.7), ((-20.0, 10.0), 1.2, 0.3))
FLAT, SHARP = (19.80, 29.90), (-16.80, 12.80)
# The paper's values of these are lost.
RATE, MOMENTUM, UPDATES, RHO, RHO_MAX, START = 5.0, 0.9, 150, 12.0, 24.0, (-20.0, 20.0)
METHODS = {
    "SGD": XSAMArguments(rho=0.0),
    "SAM": XSAMArguments(rho=RHO, alpha=1.0),
    "XSAM": XSAMArguments(rho=RHO, rho_max=RHO_MAX, alpha_search_steps=10),
}


def loss(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The function, of tensors of one shape; not finite where the deviation is not above 0."""
    total = torch.zeros_like(mean)
    for (mu, sigma), scale, share in GAUSSIANS:
        divergence = torch.log(sigma / deviation) + (deviation**2 + (mean - mu) ** 2) / (2 * sigma**2) - 0.5
        total = total + share * torch.exp(-divergence / scale**2)
    return -torch.log(total)


def path(arguments: XSAMArguments, start: tuple[float, float], updates: int = UPDATES) -> np.ndarray:
    """The points that SGD with momentum goes through with a method's gradient, (updates + 1, 2)."""
    weights = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, state = torch.optim.SGD([weights], lr=RATE, momentum=MOMENTUM), XSAMState()

    def gradient() -> torch.Tensor:
        value = loss(*weights)
        value.backward()
        return value.detach()

    points = [weights.detach().numpy().copy()]
    for _ in range(updates):
        xsam_gradient([weights], gradient, lambda: loss(*weights), arguments, state)
        optimizer.step()
        optimizer.zero_grad()
        points.append(weights.detach().numpy().copy())
    return np.array(points)


def end(points: np.ndarray) -> str:
    """
    In whose basin a path ends, `flat` or `sharp`: the minimum that SGD reaches from its last point; `none` if it left the domain. A climb
    of length ρ at every update keeps SAM and XSAM from a minimum itself.
    """
    mean, deviation = path(METHODS["SGD"], tuple(points[-1]), 100)[-1] if np.isfinite(points[-1]).all() else points[-1]
    if not (math.isfinite(mean) and math.isfinite(deviation) and deviation > 0):
        return "none"
    near = [math.dist((mean, deviation), minimum) for minimum in (FLAT, SHARP)]
    return "flat" if near[0] < near[1] else "sharp"


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--grid", type=int, default=5, help="starts along each of the two parameters")
    args = parser.parse_args(argv)
    if args.grid < 2:
        parser.error("--grid starts at 2")
    means, deviations = np.linspace(-40, 40, args.grid), np.linspace(5, 45, args.grid)
    found: dict = {
        "start": START, "rate": RATE, "momentum": MOMENTUM, "updates": UPDATES, "rho": RHO, "rho_max": RHO_MAX, "methods": {}
    }  # fmt: skip
    figure, panels = svg.make(len(METHODS), figsize=(12, 4), sharey=True)
    x, y = np.meshgrid(np.linspace(-45, 45, 200), np.linspace(2, 50, 200))
    surface = loss(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    for axes, (name, arguments) in zip(panels, METHODS.items(), strict=True):
        ends = [[end(path(arguments, (mean, deviation))) for mean in means] for deviation in deviations]
        shown = path(arguments, START)
        flat = sum(kind == "flat" for line in ends for kind in line)
        found["methods"][name] = {"from_start": end(shown), "flat": flat, "of": args.grid**2}
        axes.contour(x, y, surface, levels=20, linewidths=0.5, cmap="Greys_r")
        colours = {"flat": "tab:green", "sharp": "tab:red", "none": "tab:gray"}
        for deviation, line in zip(deviations, ends, strict=True):
            axes.scatter(means, [deviation] * len(means), s=8, c=[colours[kind] for kind in line])
        axes.plot(*shown.T, color="black", lw=1)
        axes.plot(*START, "o", color="black", ms=4)
        axes.set(
            title=f"{name}: {flat} of {args.grid**2} starts end in the flat minimum",
            xlabel="μ",
            xlim=(-45, 45),
            ylim=(2, 50),
        )
        print(
            f"{name}: from {START} to the {end(shown)} minimum; {flat} of {args.grid**2} starts end in the flat one."
        )
    panels[0].set(ylabel="σ")
    write_whole(ROOT / "results" / "two-minima.json", json.dumps(found, indent=1) + "\n")
    svg.save(figure, ROOT / "docs" / "two-minima.svg")


if __name__ == "__main__":
    run(main)
