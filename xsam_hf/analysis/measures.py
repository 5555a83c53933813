"""The measures of the commands: each takes a model and its batches to a result that is kept in a file, and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..arguments import XSAMArguments
from ..search import AlphaSearch
from . import pictures
from .arc import ArcProfile, DirectionGain, arc_profile, direction_gain
from .checked import check_count, check_length
from .checkpoint import fingerprint
from .hessian import HessianSpectrum, hessian_spectrum
from .json_numbers import numbers, strict
from .plane import Plane, landscape, plane
from .sharpness import AverageSharpness, ascent_sharpness, average_sharpness, m_sharpness
from .surface import Surface


@dataclass
class Settings:
    """
    What the measures are taken with.

    Raises:
        `ValueError`: one of the numbers of things is too small, a length is not above 0, or the seed is none of torch's.
    """

    rho: float = field(default=0.05, metadata={"help": "Length of the ascent, in the 2-norm of all trained weights."})
    rho_max: float | None = field(default=None, metadata={"help": "Radius of the arc. Default: 2 * rho."})
    ascent_steps: int = field(default=1, metadata={"help": "Steps of the ascent, each rho / ascent_steps long."})
    samples: int = field(
        default=21, metadata={"help": "Points on an axis of plane and landscape; its square is the forward passes."}
    )
    directions: int = field(
        default=50, metadata={"help": "Random directions of the average sharpness (the paper: 250)."}
    )
    eigenvalues: int = field(default=5, metadata={"help": "How many of the Hessian's highest eigenvalues."})
    hessian_method: str | None = field(
        default=None,
        metadata={
            "help": "autograd or finite_difference. Default: the first, if the model can be differentiated twice."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the random directions; the same for all checkpoints."})

    def __post_init__(self):
        for name, least in (("ascent_steps", 1), ("samples", 2), ("directions", 1), ("eigenvalues", 1)):
            check_count(name, getattr(self, name), least)
        check_length("rho", self.rho)
        if self.rho_max is not None:
            check_length("rho_max", self.rho_max)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` is {self.seed}: give a whole number from 0 to {2**63 - 1}.")


@dataclass
class Sharpness:
    """
    Args:
        average ([`AverageSharpness`]): over random directions, filter-normalised.
        elementwise ([`AverageSharpness`]): over random directions, scaled element by element.
        ascent (`float`): the highest rise that five steps of ascent find within ρ, on all batches together.
        by_batch (`list[float]`): the rise along each batch's own gradient; its mean is the m-sharpness, m the batch size.
    """

    average: AverageSharpness
    elementwise: AverageSharpness
    ascent: float
    by_batch: list[float]


@dataclass(frozen=True)
class Measure:
    """
    Args:
        take (`Callable`): model, batches and settings to a result.
        read (`Callable`): the result from the dictionary that it was kept as.
        draw (`Callable`): results by name to a figure.
        settings (`Sequence[str]`): those that the result depends on.
        caption (`str`): what the figure shows.
    """

    take: Callable[[Any, Sequence[Any], Settings], Any]
    read: Callable[[dict], Any]
    draw: Callable[[Mapping[str, Any]], Any]
    settings: Sequence[str]
    caption: str


def _arc(model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings) -> ArcProfile:
    arguments = XSAMArguments(rho=settings.rho, rho_max=settings.rho_max, ascent_steps=settings.ascent_steps)
    radii = [share * arguments.radius for share in (0.5, 1, 2)]
    return arc_profile(Surface(model, batches[:1], training=True), arguments, radii)


def _plane(model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings) -> Plane:
    surface = Surface(model, batches[:1], training=True)
    return plane(surface, settings.rho, settings.ascent_steps, settings.rho_max, samples=settings.samples)


def _gain(model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings) -> DirectionGain:
    rho, radius = settings.rho, settings.rho_max or 2 * settings.rho
    return direction_gain(model, batches, [rho / 2, rho, 2 * rho], [share * radius for share in (0.25, 0.5, 1, 2)])


def _hessian(model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings) -> HessianSpectrum:
    return hessian_spectrum(Surface(model, batches), settings.eigenvalues, settings.hessian_method, seed=settings.seed)


def _sharpness(model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings) -> Sharpness:
    surface = Surface(model, batches)
    average, elementwise = (
        average_sharpness(surface, directions=settings.directions, normalisation=kind, seed=settings.seed)
        for kind in ("filter", "element")
    )
    return Sharpness(
        average, elementwise, ascent_sharpness(surface, settings.rho), m_sharpness(model, batches, settings.rho)
    )


def _landscape(model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings) -> Plane:
    return landscape(Surface(model, batches), samples=settings.samples, seed=settings.seed)


def _read_arc(kept: dict) -> ArcProfile:
    return ArcProfile(**{**kept, "searches": [AlphaSearch(**search) for search in kept["searches"]]})


def _read_sharpness(kept: dict) -> Sharpness:
    averages = {name: AverageSharpness(**kept[name]) for name in ("average", "elementwise")}
    return Sharpness(**{**kept, **averages})


MEASURES = {
    "arc": Measure(
        _arc, _read_arc, pictures.draw_arcs, ("rho", "rho_max", "ascent_steps"),
        "The rise of the first batch's loss at distance r from the weights, over XSAM's arc; in train mode. α = 0 is the gradient "
        "g₀ (the ascent, for several steps), α = 1 SAM's direction, the dot where the loss is highest.",
    ),
    "plane": Measure(
        _plane, lambda kept: Plane(**kept), pictures.draw_planes, ("rho", "rho_max", "ascent_steps", "samples"),
        "The first batch's loss over the plane of the gradients g₀, at the weights θ₀, and g₁, after the ascent; in train mode.",
    ),
    "gain": Measure(
        _gain, lambda kept: DirectionGain(**kept), pictures.draw_gains, ("rho", "rho_max"),
        "The mean rise over batches of a batch's loss at distance r, along its own g₀, g₁ and v(α*); in train mode.",
    ),
    "hessian": Measure(
        _hessian, lambda kept: HessianSpectrum(**kept), pictures.draw_spectra, ("eigenvalues", "hessian_method", "seed"),
        "The highest eigenvalues of the Hessian of the loss over all batches; in evaluation mode.",
    ),
    "sharpness": Measure(
        _sharpness, _read_sharpness,
        lambda found: pictures.draw_sharpness({name: one.average for name, one in found.items()}),
        ("rho", "directions", "seed"),
        "The mean rise of the loss over all batches along random directions whose filters are as long as r times the weights' "
        "own; in evaluation mode.",
    ),
    "landscape": Measure(
        _landscape, lambda kept: Plane(**kept), pictures.draw_landscapes, ("samples", "seed"),
        "The rise of the loss over all batches over two random directions, filter-normalised, the same for all; in evaluation mode.",
    ),
}  # fmt: skip


def take(
    name: str, file: Path, model: Trainer | nn.Module, batches: Sequence[Any], settings: Settings, checkpoint: str
) -> Any:
    """
    A measure's result, from its file where it was taken of the same weights and batches, with the same loss and the same of its own
    settings.

    Raises:
        `ValueError`: the model cannot take the batches.
    """
    measure = MEASURES[name]
    module = model.model if isinstance(model, Trainer) else model
    assert isinstance(module, nn.Module)
    asked = {
        "measure": name,
        "of": fingerprint(module, batches),
        "loss": _loss(model, batches, checkpoint),  # a model of other code or another config may have the same weights
        "settings": {key: getattr(settings, key) for key in measure.settings},
    }
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if {key: kept[key] for key in asked} == asked:
            return measure.read(numbers(kept["result"]))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off
        pass
    result = measure.take(model, batches, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".part")
    kept = {**asked, "checkpoint": checkpoint, "result": strict(asdict(result))}
    whole.write_text(json.dumps(kept, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    whole.replace(file)
    return result


@torch.no_grad()
def _loss(model: Trainer | nn.Module, batches: Sequence[Any], checkpoint: str) -> float:
    surface = Surface(model, batches)
    with surface.kept():
        try:
            return float(surface.probe())
        except (RuntimeError, IndexError) as error:
            if isinstance(model, Trainer) or isinstance(error, NotImplementedError):
                raise
            said = " ".join(str(error).split())
            raise ValueError(
                f"{checkpoint} cannot take the batches ({said[:200]}): give `--data` of the types and lengths that it was made for."
            ) from error
