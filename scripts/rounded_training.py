"""
Trains a recipe of the image task while bfloat16 buries the ascent: `scripts/run buried` compares such runs.

    python -m scripts.rounded_training RECIPE --offset 16 --method sam ...     # all other flags are the task's

Every forward pass sees bf16(w + o) − o in place of a matrix or convolution w. The frozen o lies between `offset` and twice that, another
one for each weight: what is rounded is as large beside the ascent as weights are in a large model, and w itself decays, steps and
climbs as ever. With offset 0 the weights are left alone.

`result.json` says, as means over the training, what a pass saw of ε at these weights: seen = c(θ + ε) − c(θ).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tasks import recipes
from tasks.command import Parser, run
from tasks.files import write_whole
from tasks.image_classification import models, train


EVERY = 20  # updates: how often it is looked at


class Rounded(nn.Module):
    """Rounds a weight as bfloat16 rounds it plus a frozen number, which is then taken off again."""

    def __init__(self, weight: Tensor, offset: float, generator: torch.Generator):
        super().__init__()
        self.register_buffer("offset", offset * (1 + torch.rand(weight.shape, generator=generator)))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + self.offset).to(torch.bfloat16).float() - self.offset


class Seen:
    """
    Compares what the two passes of an update see of the weights; a hook before the model's forward.

    Args:
        cast (`dict[torch.Tensor, Callable]`): of each weight that is rounded, how.
    """

    def __init__(self, cast):
        self.cast = cast
        self.passes = 0
        self.before: list[tuple[Tensor, Tensor]] = []
        self.found: dict[str, list[float]] = {"length": [], "along": [], "cosine": []}

    def __call__(self, model: nn.Module, *_) -> None:
        if not (model.training and torch.is_grad_enabled()):  # an evaluation, or a forward pass of a search
            return
        update, second = divmod(self.passes, 2)
        self.passes += 1
        if update % EVERY:
            return
        with torch.no_grad():
            now = [(weight.double(), cast(weight).double()) for weight, cast in self.cast.items()]
        if not second:
            self.before = now
            return
        epsilon, seen = (
            torch.cat([(a[i] - b[i]).flatten() for a, b in zip(now, self.before, strict=True)]) for i in (0, 1)
        )
        size, length, along = epsilon.norm(), seen.norm(), seen @ epsilon
        numbers = (length / size, along / size**2, along / (length * size))
        for name, number in zip(self.found, numbers, strict=True):
            self.found[name].append(float(number))


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--offset", type=float, required=True)
    args, flags = parser.parse_known_args(argv)
    looks: list[Seen] = []
    original = models.build

    def build(*arguments):
        model, generator = original(*arguments), torch.Generator().manual_seed(torch.initial_seed())
        cast = {}
        for module in list(model.modules()):
            if args.offset and isinstance(module, nn.Linear | nn.Conv2d):
                rounded = Rounded(module.weight, args.offset, generator)
                parametrize.register_parametrization(module, "weight", rounded)
                cast[module.parametrizations.weight.original] = rounded
        if cast:
            looks.append(Seen(cast))
            model.register_forward_pre_hook(looks[0])
        return model

    models.build = build
    path = train.train(*recipes.parse(train.ARGUMENTS, flags, __doc__, "runs/rounded_training"))
    result = json.loads(path.read_bytes())
    if result["arguments"]["rho"] > 0 and looks:
        result["seen"] = {name: fmean(numbers) for name, numbers in looks[0].found.items()}
    write_whole(Path(path), json.dumps({**result, "offset": args.offset}, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
