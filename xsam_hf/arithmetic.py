"""
Arithmetic on vectors, which are lists of tensors: in place, one call for all tensors of a device and a dtype.

A factor that lives on a CPU is a number, which saves a pass over the memory. On another device it stays there: reading it would
wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import groups, local, number, together


_LARGE = 2**20  # elements whose kernel takes as long as its launch

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_(y: Sequence[Tensor], x: Sequence[Tensor]) -> None:
    r"""$y \leftarrow x$."""
    for ys, xs in groups(y, x):
        torch._foreach_copy_(ys, xs)


def clone(x: Sequence[Tensor]) -> list[Tensor]:
    """A copy of x."""
    parts = local(x)
    if len({(part.device, part.dtype) for part in parts}) == 1:
        return _copies(parts)
    return [part.clone() for part in parts]


def _copies(x: list[Tensor]) -> list[Tensor]:
    """Of tensors of one device and dtype. Machines with GPUs still have torch 2.11, which lacks `_foreach_clone`."""
    new = [torch.empty_like(part) for part in x]
    torch._foreach_copy_(new, x)
    return new


def scale_(x: Sequence[Tensor], factor: Tensor | float) -> None:
    r"""$x \leftarrow a\,x$, rounded once."""
    for (xs,) in groups(x):
        if isinstance(factor, Tensor) and xs[0].dtype in (torch.float32, torch.float64):
            # On a CPU too, where a product with a number takes three times as long for small tensors.
            torch._foreach_mul_(xs, factor.to(xs[0].device, xs[0].dtype))
        elif not isinstance(a := number_or_tensor(factor), Tensor):
            torch._foreach_mul_(xs, a)
        else:
            _scale_half_(xs, a.to(xs[0].device, torch.float32))


def _scale_half_(x: list[Tensor], factor: Tensor) -> None:
    """
    The product of tensors in half precision and a factor in float32 on their device, rounded once.

    A list has no such kernel: a 0-dim factor is rounded to the list's dtype, and CUDA's unscaling of gradients knows no bfloat16. A factor
    of one dimension is not rounded, tensor by tensor. Small tensors are put together, for fewer kernels.
    """
    factor = factor.view(1)
    large = [part for part in x if part.numel() >= _LARGE]
    if large:
        torch._foreach_mul_(large, [factor] * len(large))
    small = [part for part in x if part.numel() < _LARGE]
    for (some,) in together(small) if small else ():
        product = torch.cat([part.reshape(-1) for part in some]).mul_(factor)
        parts = product.split([part.numel() for part in some])
        torch._foreach_copy_(some, [part.view(to.shape) for part, to in zip(parts, some, strict=True)])


def add_(y: Sequence[Tensor], x: Sequence[Tensor], factor: Tensor | float = 1.0, keep: bool = False) -> None:
    r"""
    $y \leftarrow y + a\,x$.

    Args:
        y, x (`Sequence[torch.Tensor]`): of equal shapes and dtypes.
        factor (`torch.Tensor` or `float`, *optional*, defaults to 1.0): a.
        keep (`bool`, *optional*, defaults to `False`): leave x as it is; otherwise it is used up.
    """
    a = number_or_tensor(factor)
    for ys, xs in groups(y, x):
        if not isinstance(a, Tensor):
            torch._foreach_add_(ys, xs, alpha=a)
        elif not keep:
            scale_(xs, a)
            torch._foreach_add_(ys, xs)
        else:
            for some, others in together(ys, xs):
                scaled = _copies(others)
                scale_(scaled, a)
                torch._foreach_add_(some, scaled)
                del scaled  # before the next one is made


def subtract_(y: Sequence[Tensor], x: Sequence[Tensor]) -> None:
    r"""$y \leftarrow y - x$."""
    for ys, xs in groups(y, x):
        torch._foreach_sub_(ys, xs)


def zero_unless(condition: Tensor, x: Sequence[Tensor]) -> None:
    """
    Zeroes the vector, in place, where the 0-dim condition is false.

    A product with 0 would keep NaN; that of the bits, read as a whole number, with 0 or 1 does not.
    """
    for (xs,) in groups(x):
        if condition.device.type == "cpu":
            if not number(condition):
                torch._foreach_zero_(xs)
        else:
            whole = _WHOLE[xs[0].element_size()]
            torch._foreach_mul_([part.view(whole) for part in xs], condition.to(xs[0].device, whole))


def average_(d: Sequence[Tensor], g: Sequence[Tensor], share: float, condition: Tensor, less: float = 0.0) -> None:
    r"""
    $d \leftarrow (1-s)\,d + s\,g$ where the 0-dim condition holds; before that, $g \leftarrow g - b\,d$.

    Args:
        d, g (`Sequence[torch.Tensor]`): of equal shapes and dtypes.
        share (`float`): s.
        condition (`torch.Tensor`): whether g is finite.
        less (`float`, *optional*, defaults to 0.0): b.
    """
    for ds, gs in groups(d, g):
        for some, others in together(ds, gs):
            change = torch._foreach_sub(others, some)
            zero_unless(condition, change)
            if less:
                torch._foreach_add_(others, some, alpha=-less)
            torch._foreach_add_(some, change, alpha=share)
            del change


def mix_(
    g: Sequence[Tensor], m: Sequence[Tensor], c: Tensor | float, d: Tensor | float, share: float, size: Tensor
) -> None:
    r"""
    $g \leftarrow c\,m + d\,g$ and $m \leftarrow \beta\,m + (1-\beta)\,g/\|g\|$, both from the old ones; nothing for a g that is not finite.

    Args:
        g, m (`Sequence[torch.Tensor]`): of equal shapes and dtypes.
        c, d (`torch.Tensor` or `float`): 0-dim.
        share (`float`): β.
        size (`torch.Tensor`): ‖g‖, 2-norm over all of it, 0-dim.
    """
    finite = torch.isfinite(size)
    one = torch.ones_like(size)
    kept = torch.where(finite, share * one, one)
    unit = torch.where(finite & (size > 0), (1 - share) / size, 0 * one)
    for gs, ms in groups(g, m):
        for some, others in together(gs, ms):
            old = _copies(some)
            zero_unless(finite, old)
            if isinstance(d, Tensor):
                scale_(some, torch.where(finite, d, one))
            if isinstance(c, Tensor):
                add_(some, others, torch.where(finite, c, 0 * one), keep=True)
            scale_(others, kept)
            add_(others, old, unit)
            del old  # before the next one is made


def multiply_by_sizes_(g: Sequence[Tensor], w: Sequence[Tensor], plus: float) -> None:
    r"""$g \leftarrow (|w| + \eta)\,g$, element by element."""
    for gs, ws in groups(g, w):
        for some, others in together(gs, ws):
            sizes = torch._foreach_abs(others)
            torch._foreach_add_(sizes, plus)
            torch._foreach_mul_(some, sizes)
            del sizes


def number_or_tensor(factor: Tensor | float) -> Tensor | float:
    """A factor that lives on a CPU as a number, another one as it is."""
    return number(factor) if isinstance(factor, Tensor) and factor.device.type == "cpu" else factor
