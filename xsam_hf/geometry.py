"""One vector is a list of tensors: its norm, angle and rotation, for whole and for sharded tensors alike.

Everything here takes the lists that PyTorch keeps anyway (parameters, gradients): no function makes a temporary larger than one
tensor or 64 MiB. Sums are taken in float32 or better; float64 stays float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.distributed.tensor import DTensor


# Elements of a temporary: on a CPU in the cache; on another device many, for few kernels, 64 MiB in float32 at most.
_SMALL, _BLOCK, _PIECE, _TOGETHER = 2**18, 2**16, 2**23, 2**24

_PLAIN, _REAL = {Tensor, nn.Parameter}, {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def are_plain(vector: Sequence[Any]) -> bool:
    """Whether all are tensors of real numbers that this process has to itself."""
    return set(map(type, vector)) <= _PLAIN and {tensor.dtype for tensor in vector} <= _REAL


def local(vector: Sequence[Tensor]) -> list[Tensor]:
    """
    The part of each tensor that this process holds, as real numbers; no copy.

    The shard of a `DTensor`; a complex tensor as its real and imaginary parts, so that it counts as two real weights.
    """
    if are_plain(vector):
        return list(vector)  # asked for some twenty times an update
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in vector]
    return [torch.view_as_real(part) if part.is_complex() else part for part in parts]


def groups(*vectors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The local parts of some vectors, those of one device and one dtype of the first together."""
    parts = [local(vector) for vector in vectors]
    if len({part.dtype for part in parts[0]}) == len({part.device for part in parts[0]}) == 1:
        yield tuple(parts)
        return
    alike = defaultdict(list)
    for members in zip(*parts, strict=True):
        alike[members[0].device, members[0].dtype].append(members)
    for some in alike.values():
        yield tuple(map(list, zip(*some, strict=True)))


def number(x: Tensor) -> float:
    """The value of a 0-dim tensor on a CPU: a read of memory, for which nothing waits."""
    return x.numpy().item()


def together(*vectors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The same tensors of some vectors, as many at a time as a temporary may hold: 64 MiB in float32, or a single larger one."""
    first, filled = 0, 0
    for i, part in enumerate(vectors[0]):
        if i > first and filled + part.numel() > _TOGETHER:
            yield tuple(list(vector[first:i]) for vector in vectors)
            first, filled = i, 0
        filled += part.numel()
    yield tuple(list(vector[first:]) for vector in vectors)


def norm(vector: Sequence[Tensor]) -> Tensor:
    """‖x‖, the 2-norm over all elements of all tensors; a 0-dim tensor, equal on every process that holds a shard."""
    dtype = _accumulation_dtype(vector)

    def square(x: list[Tensor]) -> Tensor:
        if x[0].device.type == "cpu" and _size(x) <= _SMALL:
            return torch.linalg.vector_norm(_flat(x, dtype)).square()
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(x, 2, dtype=dtype))).square()

    return total_of(vector, square).sqrt()


def angle(x: Sequence[Tensor], y: Sequence[Tensor], norm_x: Tensor, norm_y: Tensor) -> Tensor:
    r"""
    ψ = angle(x, y) in radians, in [0, π]; a 0-dim tensor.

    Computed as $2\,\mathrm{atan2}(\|\hat x - \hat y\|, \|\hat x + \hat y\|)$, which keeps its digits at every size, where
    arccos of the cosine loses all of them below about 1e-3 rad in float32 (and is NaN once rounding carries it past 1).

    Args:
        x, y (`Sequence[torch.Tensor]`): the two vectors. x says what is sharded.
        norm_x, norm_y (`torch.Tensor`): ‖x‖ and ‖y‖, 0-dim, which the caller has already.
    """
    dtype = _accumulation_dtype([*x, *y])
    ratio = torch.where(norm_x > 0, norm_y / norm_x, torch.zeros_like(norm_x)).to(dtype)  # makes both as long
    if {part.device.type for part in x} == {"cpu"}:
        # ‖r x − y‖² + ‖r x + y‖² is known, and the smaller of the two keeps its digits.
        both = 2 * ((ratio * norm_x).square() + norm_y.square())
        nearer = total_of(x, lambda x, y: _distance(x, y, number(ratio), dtype), y)
        if obtuse := number(2 * nearer) > number(both):
            nearer = total_of(x, lambda x, y: _distance(x, y, -number(ratio), dtype), y)
        further = (both - nearer).sqrt()
        return 2 * (torch.atan2(further, nearer.sqrt()) if obtuse else torch.atan2(nearer.sqrt(), further))

    def distances(x: list[Tensor], y: list[Tensor]) -> Tensor:
        """‖r x − y‖² and ‖r x + y‖²."""
        found = _both_distances(x, y, ratio.to(x[0].device), dtype)
        return torch.stack(
            [torch.linalg.vector_norm(torch.stack(sizes)) for sizes in zip(*found, strict=True)]
        ).square()

    apart, together = total_of(x, distances, y).sqrt()
    return 2 * torch.atan2(apart, together)


def slerp(alpha: float | Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    The coefficients (a, b) of $v(\alpha) = a\,v_0 + b\,v_1$ (Eq. 6), two unit vectors at the angle ψ; ‖v(α)‖ = 1.

    $a = \sin((1-\alpha)\psi)/\sin\psi$ and $b = \sin(\alpha\psi)/\sin\psi$. At ψ → 0 the two vectors are one direction
    and the limits 1 − α and α are taken. At ψ → π they span no plane: the nearer of the two is taken.

    Args:
        alpha (`float` or `torch.Tensor`): position on the arc, 0 = v_0, 1 = v_1, beyond 1 = past v_1.
        psi (`torch.Tensor`): angle between the two, in radians, 0-dim.
    """
    sine = torch.sin(psi)
    flat = sine.abs() < 4 * torch.finfo(psi.dtype).eps
    sine = torch.where(flat, torch.ones_like(sine), sine)
    first = torch.sin((1 - alpha) * psi) / sine
    second = torch.sin(alpha * psi) / sine
    nearer_first = (alpha < 0.5) * torch.ones_like(psi)
    opposite = psi > torch.pi / 2
    first = torch.where(flat, torch.where(opposite, nearer_first, (1 - alpha) * torch.ones_like(psi)), first)
    second = torch.where(flat, torch.where(opposite, 1 - nearer_first, alpha * torch.ones_like(psi)), second)
    return first, second


def _distance(x: list[Tensor], y: list[Tensor], ratio: float, dtype: torch.dtype) -> Tensor:
    """
    ‖r x − y‖² on a CPU, block by block.

    A block and its temporary stay in the cache, and the temporary's memory is used again for every block: fresh pages from the
    kernel take up to twenty times as long as the arithmetic (measured).
    """
    whole = _size(x)
    small = whole <= _SMALL  # fits as it is
    free = torch.empty(whole if small else _BLOCK, dtype=dtype)
    pieces = [(_flat(x, dtype), _flat(y, dtype))] if small else _blocks(x, y, _BLOCK, dtype)
    sizes = [torch.linalg.vector_norm(torch.sub(b, a, alpha=ratio, out=free[: a.numel()])) for a, b in pieces]
    return torch.linalg.vector_norm(torch.stack(sizes)).square()


def _both_distances(
    x: list[Tensor], y: list[Tensor], ratio: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Norms of r x − y and of r x + y with few calls, each for many tensors; which one is needed is not known without a wait.

    Half precision is put together in pieces of float32.
    """
    if x[0].dtype == dtype:
        for some, others in together(x, y):
            scaled = torch._foreach_mul(some, ratio)
            torch._foreach_sub_(scaled, others)
            apart = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled, 2)))
            torch._foreach_add_(scaled, others, alpha=2)
            sizes = torch._foreach_norm(scaled, 2)
            del scaled  # before the next one is made
            yield apart, torch.linalg.vector_norm(torch.stack(sizes))
    else:
        for a, b in _blocks(x, y, _PIECE, x[0].dtype):
            piece = a.to(dtype).mul_(ratio).sub_(b)
            apart = torch.linalg.vector_norm(piece)
            size = torch.linalg.vector_norm(piece.add_(b, alpha=2))
            del piece, a, b
            yield apart, size


def _blocks(x: list[Tensor], y: list[Tensor], size: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Elements of x and the same ones of y, `size` at a time; small tensors are put together, in the given dtype."""
    pieces: list[tuple[Tensor, Tensor]] = []
    filled = 0
    for pair in zip(x, y, strict=True):
        for piece in zip(*(part.reshape(-1).split(size) for part in pair), strict=True):
            n = piece[0].numel()
            if n == size and piece[0].dtype == piece[1].dtype == dtype:
                yield piece
                continue
            if pieces and filled + n > size:
                yield _joined(pieces, dtype)
                pieces, filled = [], 0
            pieces.append(piece)
            filled += n
    if pieces:
        yield _joined(pieces, dtype)


def _size(x: Sequence[Tensor]) -> int:
    return sum([part.numel() for part in x])


def _flat(x: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _flatten_dense_tensors(x).to(dtype)


def _joined(pieces: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first, second = zip(*pieces, strict=True)
    if len(pieces) == 1:
        return first[0].to(dtype), second[0].to(dtype)
    return torch.cat(first).to(dtype), torch.cat(second).to(dtype)


def _accumulation_dtype(vector: Sequence[Tensor]) -> torch.dtype:
    double = {torch.float64, torch.complex128}
    return torch.float64 if double & {tensor.dtype for tensor in vector} else torch.float32


def total_of(vector: Sequence[Tensor], sums: Callable[..., Tensor], *others: Sequence[Tensor]) -> Tensor:
    """
    `sums` of the local parts of a vector (and of others beside it), added up over devices and processes.

    Shards add up over the mesh dimensions that split them, replicas count once. One reduction for each kind of sharding.
    """
    split_alike: dict[Any, list[int]] = defaultdict(list)
    if set(map(type, vector)) <= _PLAIN:
        split_alike[None] = list(range(len(vector)))
    else:
        for i, tensor in enumerate(vector):
            split_alike[_split(tensor)].append(i)
    total: Tensor | None = None
    for split, members in split_alike.items():
        subtotal: Tensor | None = None
        for alike in groups(*([parts[i] for i in members] for parts in (vector, *others))):
            part = sums(*alike)
            subtotal = part if subtotal is None else subtotal + part.to(subtotal.device)
        assert subtotal is not None
        if split is not None:
            mesh, dimensions = split
            home, subtotal = (
                subtotal.device,
                subtotal.to(mesh.device_type),
            )  # offloaded shards are on a CPU, which NCCL does not serve
            for dimension in dimensions:
                dist.all_reduce(subtotal, group=mesh.get_group(dimension))
            subtotal = subtotal.to(home)
        total = subtotal if total is None else total + subtotal.to(total.device)
    assert total is not None
    return total


def _split(tensor: Tensor):
    """Which mesh dimensions split a tensor's elements between processes: `(mesh, dimensions)`, or None for a whole one."""
    if not isinstance(tensor, DTensor):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise NotImplementedError(
            f"A tensor with placements {tensor.placements} holds unreduced sums: its norm is not defined yet. "
            "Call `redistribute` on it first."
        )
    return tensor.device_mesh, tuple(
        i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()
    )
