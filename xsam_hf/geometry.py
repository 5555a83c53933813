"""One vector is a list of tensors: its norm, angle and rotation, for whole and for sharded tensors alike.

Everything here takes the lists that PyTorch keeps anyway (parameters, gradients) and never concatenates them: no function
makes a temporary larger than one tensor. Sums are taken in float32 or better; float64 stays float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


# Elements of a temporary. The kernel hands out a larger one as fresh pages each time, which took twenty times as long as the
# arithmetic (measured, CPU); a GPU's allocator keeps its memory, and there it is launches that should be few.
_CHUNK = {"cpu": 2**16}
_LARGE_CHUNK = 2**26


def local(vector: Sequence[Tensor]) -> list[Tensor]:
    """The part of each tensor that this process holds: the shard of a `DTensor`, a plain tensor itself (no copy)."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in vector]


def norm(vector: Sequence[Tensor]) -> Tensor:
    """‖x‖, the 2-norm over all elements of all tensors; a 0-dim tensor, equal on every process that holds a shard."""
    norms = torch._foreach_norm(local(vector), 2, dtype=_accumulation_dtype(vector))
    return _total([n.square() for n in norms], vector).sqrt()


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """x·y over all elements of all tensors; a 0-dim tensor, equal on every process that holds a shard. x says what is sharded."""
    dtype = _accumulation_dtype([*x, *y])
    sums = [torch.stack([(a.to(dtype) * b.to(dtype)).sum() for a, b in pairs]).sum() for pairs in _chunks(x, y)]
    return _total(sums, x)


def angle(x: Sequence[Tensor], y: Sequence[Tensor], norm_x: Tensor, norm_y: Tensor) -> Tensor:
    r"""
    ψ = angle(x, y) in radians, in [0, π]; a 0-dim tensor.

    Computed as $2\,\mathrm{atan2}(\|\hat x - \hat y\|, \|\hat x + \hat y\|)$, which keeps its digits at every size, where
    arccos of the cosine loses all of them below about 1e-3 rad in float32 (and is NaN once rounding carries it past 1).

    Args:
        x, y (`Sequence[torch.Tensor]`): the two vectors.
        norm_x, norm_y (`torch.Tensor`): ‖x‖ and ‖y‖, 0-dim, which the caller has already.
    """
    dtype = _accumulation_dtype([*x, *y])
    tiny = torch.finfo(dtype).tiny
    norm_x, norm_y = norm_x.clamp_min(tiny), norm_y.clamp_min(tiny)
    apart, together = [], []
    for pairs in _chunks(x, y):
        minus, plus = [], []
        for a, b in pairs:
            a, b = a.to(dtype) / norm_x.to(a.device), b.to(dtype) / norm_y.to(b.device)
            minus.append(torch.linalg.vector_norm(a - b))
            plus.append(torch.linalg.vector_norm(a + b))
        apart.append(torch.stack(minus).square().sum())
        together.append(torch.stack(plus).square().sum())
    return 2 * torch.atan2(_total(apart, x).sqrt(), _total(together, x).sqrt())


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


def _chunks(x: Sequence[Tensor], y: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each tensor of x, pieces of it beside those of y."""
    for a, b in zip(local(x), local(y), strict=True):
        size = _CHUNK.get(a.device.type, _LARGE_CHUNK)
        yield list(zip(a.reshape(-1).split(size), b.reshape(-1).split(size), strict=True))


def _accumulation_dtype(vector: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in vector) else torch.float32


def _total(parts: Sequence[Tensor], vector: Sequence[Tensor]) -> Tensor:
    """Sums one number a tensor into one; shards add up over the mesh dimensions that split them, replicas count once."""
    groups = defaultdict(list)
    for part, tensor in zip(parts, vector, strict=True):
        groups[_split(tensor)].append(part)
    device, total = parts[0].device, torch.zeros((), dtype=parts[0].dtype, device=parts[0].device)
    for split, members in groups.items():
        subtotal = torch.stack([member.to(device) for member in members]).sum()
        if split is not None:
            mesh, dimensions = split
            for dimension in dimensions:
                dist.all_reduce(subtotal, group=mesh.get_group(dimension))
        total = total + subtotal
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
