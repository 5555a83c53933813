"""One vector is a list of tensors: its norm, angle and rotation, for whole and for sharded tensors alike.

Everything here takes the lists that PyTorch keeps anyway (parameters, gradients) and never concatenates them: no function
makes a temporary larger than one tensor. Sums are taken in float32 or better; float64 stays float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


# Elements of a temporary. On a CPU it should stay in the cache, and a GPU's kernels should be few.
_BATCH = {"cpu": 2**16}
_LARGE_BATCH = 2**22


def local(vector: Sequence[Tensor]) -> list[Tensor]:
    """
    The part of each tensor that this process holds, as real numbers; no copy.

    The shard of a `DTensor`; a complex tensor as its real and imaginary parts, so that it counts as two real weights.
    """
    parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in vector)
    return [torch.view_as_real(part) if part.is_complex() else part for part in parts]


def norm(vector: Sequence[Tensor]) -> Tensor:
    """‖x‖, the 2-norm over all elements of all tensors; a 0-dim tensor, equal on every process that holds a shard."""
    dtype = _accumulation_dtype(vector)
    return _total(vector, lambda x: torch.stack(torch._foreach_norm(x, 2, dtype=dtype)).square().sum()).sqrt()


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
    tiny = torch.finfo(dtype).tiny
    norm_x, norm_y = norm_x.clamp_min(tiny), norm_y.clamp_min(tiny)

    def sums(x: list[Tensor], y: list[Tensor]) -> Tensor:
        apart, together = [], []
        for a, b, free in _batches(x, y, dtype):
            a.div_(norm_x.to(a.device))
            b.div_(norm_y.to(b.device))
            apart.append(torch.linalg.vector_norm(torch.sub(a, b, out=free)))
            together.append(torch.linalg.vector_norm(a.add_(b)))
        return torch.stack([torch.stack(apart), torch.stack(together)]).square().sum(dim=1)

    apart, together = _total(x, sums, y).sqrt()
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


def zero_unless(condition: Tensor, vector: Sequence[Tensor]) -> None:
    """
    Zeroes the vector, in place, where the 0-dim condition is false.

    Decided on the device: a branch would synchronise with the host, and a product with 0 would keep NaN.
    """
    for part in local(vector):
        part.masked_fill_(~condition.to(part.device), 0)


def _batches(x: Sequence[Tensor], y: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """
    Elements of x and the same ones of y, copied, as many at a time as are fit for a temporary, and room for as many more.

    All in one piece of memory, written again for every batch: a temporary of each operation's own would be fresh pages from the
    kernel, which take up to twenty times as long as the arithmetic (measured, CPU).
    """
    size = min(_BATCH.get(x[0].device.type, _LARGE_BATCH), sum(part.numel() for part in x))
    memory = torch.empty(3, size, dtype=dtype, device=x[0].device)
    pieces: list[tuple[Tensor, Tensor]] = []
    filled = 0
    for pair in zip(x, y, strict=True):
        for piece in zip(*(part.reshape(-1).split(max(size, 1)) for part in pair), strict=True):
            if filled + piece[0].numel() > size:
                yield _filled(memory[:, :filled], pieces)
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece[0].numel()
    yield _filled(memory[:, :filled], pieces)


def _filled(memory: Tensor, pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    a, b, free = memory
    first, second = zip(*pieces, strict=True)
    return torch.cat(first, out=a), torch.cat(second, out=b), free


def _accumulation_dtype(vector: Sequence[Tensor]) -> torch.dtype:
    double = (torch.float64, torch.complex128)
    return torch.float64 if any(tensor.dtype in double for tensor in vector) else torch.float32


def _total(vector: Sequence[Tensor], sums: Callable[..., Tensor], *others: Sequence[Tensor]) -> Tensor:
    """
    `sums` of the local parts of a vector (and of others beside it), added up over devices and processes.

    Shards add up over the mesh dimensions that split them, replicas count once. One reduction for each kind of sharding.
    """
    groups = defaultdict(list)
    for tensor, *parts in zip(vector, local(vector), *map(local, others), strict=True):
        groups[_split(tensor), parts[0].device].append(parts)
    total: Tensor | None = None
    for (split, _), members in groups.items():
        subtotal = sums(*map(list, zip(*members, strict=True)))
        if split is not None:
            mesh, dimensions = split
            for dimension in dimensions:
                dist.all_reduce(subtotal, group=mesh.get_group(dimension))
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
    return tensor.device_mesh, tuple(i for i, placement in enumerate(tensor.placements) if placement.is_shard())
