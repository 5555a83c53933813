"""What the forward pass sees of an ascent where it takes weights in half precision: the step is rounded together with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import local, total_of


_SAMPLE = 2**20  # weights that are looked at, at most but for one more in each tensor


@dataclass
class _Part:
    """The part of one weight that is looked at: where it is, c(θ_0) there, and the ascent so far."""

    weight: Tensor
    index: Tensor | None
    dtype: torch.dtype
    start: Tensor
    epsilon: Tensor

    @staticmethod
    def take(vector: Tensor, index: Tensor | None) -> Tensor:
        flat = vector.reshape(-1)
        return flat if index is None else flat[index]

    def seen(self) -> Tensor:
        """c(θ_i) − c(θ_0)."""
        (now,) = local([self.weight])
        return self.take(now, self.index).to(self.dtype).float() - self.start


class SeenAscent:
    r"""
    Compares an ascent ε with what the forward pass sees of it, $c(\theta + \varepsilon) - c(\theta)$, where c rounds to the pass's dtype.

    Give it to [`xsam_gradient`], which measures once, at the first ascent, on a million weights drawn at random (all, of a smaller
    model). The measure waits for no device; reading it does.

    Where ε is short beside the spacing of half precision, most weights do not move and a few move too far. Over many weights the
    errors even out along ε (`share` stays near 1), and across it they add up: the move is longer, and its cosine with ε is small.

    Args:
        dtypes (`Mapping[torch.Tensor, torch.dtype]`):
            What the forward pass takes each weight in, of those that it takes in half precision. The others are not looked at, and
            with none there is nothing to measure.
    """

    def __init__(self, dtypes: Mapping[Tensor, torch.dtype]):
        self._dtypes = dict(dtypes)
        self._parts: dict[Tensor, _Part] = {}
        self._sums: Tensor | None = None  # ‖seen‖², ⟨seen, ε⟩, ‖ε‖²
        size = sum([weight.numel() for weight in self._dtypes])
        self._share = min(1.0, _SAMPLE / size) if size else 1.0

    @property
    def is_due(self) -> bool:
        """Whether the coming ascent is to be measured."""
        return bool(self._dtypes) and self._sums is None

    @property
    def in_half(self) -> bool:
        """Whether a weight is taken in half precision."""
        return any(dtype.itemsize < 4 for dtype in self._dtypes.values())

    def begin(self) -> None:
        """Forgets an ascent that an exception ended."""
        self._parts, self._sums = {}, None

    @contextmanager
    def step(self, weights: Sequence[Tensor], direction: Sequence[Tensor], factor: Tensor) -> Iterator[None]:
        """
        A block that adds the step a·x to the weights; the later steps of an ascent add to the earlier ones.

        Args:
            weights, direction (`Sequence[torch.Tensor]`): θ and x.
            factor (`torch.Tensor`): a, 0-dim.
        """
        for weight, now, along in zip(weights, local(weights), local(direction), strict=True):
            dtype = self._dtypes.get(weight)
            if dtype is None:
                continue
            part = self._parts.get(weight)
            if part is None:
                index = self._draw(now)
                start = _Part.take(now, index).to(dtype, copy=True).float()
                part = self._parts[weight] = _Part(weight, index, dtype, start, torch.zeros_like(start))
            part.epsilon.add_(_Part.take(along, part.index).float() * factor.to(along.device))
        yield
        if self._parts:
            parts = list(self._parts.values())
            seen, epsilon = [part.seen() for part in parts], [part.epsilon for part in parts]
            self._sums = total_of([part.weight for part in parts], _products, seen, epsilon)

    def _draw(self, part: Tensor) -> Tensor | None:
        if self._share == 1 or part.numel() == 0:
            return None
        generator = torch.Generator(part.device).manual_seed(0)  # moves no random stream
        n = math.ceil(self._share * part.numel())
        return torch.randint(part.numel(), (n,), generator=generator, device=part.device)

    def read(self) -> dict[str, float] | None:
        """
        The measure, which is read once; `None` if there is none. An ascent that was not finite (the first of a `GradScaler`, for
        instance), or of length 0, is none, and the next one is measured.

        Returns:
            `dict[str, float]`, *optional*:
                `length` ‖seen‖/‖ε‖, `share` ⟨seen, ε⟩/‖ε‖², what arrives along ε, and `cosine` of the angle between the two (0 if
                nothing is seen).
        """
        if self._sums is None or not self._parts:
            return None
        square, product, whole = self._sums.tolist()
        if not (math.isfinite(square + product + whole) and whole > 0):
            self.begin()
            return None
        self._parts = {}
        cosine = product / math.sqrt(square * whole) if square > 0 else 0.0
        return {"length": math.sqrt(square / whole), "share": product / whole, "cosine": cosine}


def _products(_: Sequence[Tensor], seen: Sequence[Tensor], epsilon: Sequence[Tensor]) -> Tensor:
    s, e = torch.cat(list(seen)), torch.cat(list(epsilon))
    return torch.stack([s @ s, s @ e, e @ e])
