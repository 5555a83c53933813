"""Weights in half precision: most of a small step is lost when it is rounded to the nearest number; rounding at random keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .arithmetic import add_, number_or_tensor
from .geometry import groups


# Elements at a time: with float32 and whole numbers beside them, all temporaries are below 64 MiB.
_PIECE = 2**21


def add_rounded(
    weights: Sequence[Tensor],
    terms: Sequence[tuple[Sequence[Tensor], float | Tensor]],
    generator: torch.Generator | None = None,
) -> None:
    r"""
    $\theta \leftarrow \theta + \sum a x$, in place. In half precision the sum is made in float32 and rounded once.

    Args:
        weights (`Sequence[torch.Tensor]`): θ.
        terms (`Sequence[tuple]`): the vectors x, which stay as they are, and their factors a.
        generator (`torch.Generator`, *optional*):
            Rounds half precision up or down at random, so that the mean is exact; without one, to the nearest.
    """
    factors = [number_or_tensor(a) for _, a in terms]
    for ws, *vectors in groups(weights, *(x for x, _ in terms)):
        if ws[0].dtype not in (torch.float16, torch.bfloat16):
            for xs, a in zip(vectors, factors, strict=True):
                add_(ws, xs, a, keep=True)
            continue
        for some, *others in _pieces(ws, *vectors):
            value = torch.cat(some).float()
            for xs, a in zip(others, factors, strict=True):
                part = torch.cat(xs)
                if isinstance(a, Tensor):
                    value.add_(part.float().mul_(a.to(part.device)))
                else:
                    value.add_(part, alpha=a)
            rounded = value.to(ws[0].dtype) if generator is None else _at_random(value, ws[0].dtype, generator)
            torch._foreach_copy_(some, list(rounded.split([part.numel() for part in some])))


def _at_random(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """To one of the two nearest numbers, each as often as it is near; numbers that need no rounding stay."""
    if dtype == torch.bfloat16:
        # A bfloat16 is the upper half of a float32: a random lower half carries over as often as the value is near.
        noise = torch.randint(2**16, value.shape, dtype=torch.int32, generator=generator, device=generator.device)
        bits = value.view(torch.int32).add_(noise.to(value.device)).bitwise_and_(-(2**16))
        return bits.view(torch.float32).to(dtype)
    nearest = value.to(dtype)
    error = value.sub_(nearest)
    # The bit patterns of floating-point numbers of one sign are in the order of their size.
    outwards = (error > 0) == (nearest > 0)
    other = outwards.to(torch.int16).mul_(2).sub_(1).add_(nearest.view(torch.int16)).view(dtype)
    gap = other.float().sub_(nearest).abs_()
    random = torch.rand(value.shape, generator=generator, device=generator.device).to(value.device)
    return torch.where((nearest != 0) & (random.mul_(gap) < error.abs_()), other, nearest)


def _pieces(*vectors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Flat parts of some vectors, so many elements at a time; what is written into those of the first is written into it."""
    pieces: list[tuple[Tensor, ...]] = []
    filled = 0
    for alike in zip(*vectors, strict=True):
        flat = alike[0].view(-1) if alike[0].is_contiguous() else alike[0].contiguous().view(-1)
        for piece in zip(flat.split(_PIECE), *(part.reshape(-1).split(_PIECE) for part in alike[1:]), strict=True):
            if pieces and filled + piece[0].numel() > _PIECE:
                yield tuple(map(list, zip(*pieces, strict=True)))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece[0].numel()
        if not alike[0].is_contiguous():
            if pieces:
                yield tuple(map(list, zip(*pieces, strict=True)))
                pieces, filled = [], 0
            alike[0].copy_(flat.view(alike[0].shape))
    if pieces:
        yield tuple(map(list, zip(*pieces, strict=True)))
