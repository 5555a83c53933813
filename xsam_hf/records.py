"""A thing that a module keeps, as it was at one moment: whether it has moved since, and how it is put back."""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
CONTAINERS = (list, tuple, dict, set, frozenset, deque, np.ndarray)
_PLAIN = (int, float, complex, str, bytes, np.generic)
_MOST = 10_000  # things of a container that are compared
_MOST_NUMBERS = 100_000  # of its arrays together
_DEEPEST = 10


@dataclass
class Record:
    """A thing as it was. Of a tensor or a generator its content too, and where a tensor stood and how often it had been written to."""

    value: Any
    content: Any = None
    memory: Tensor | None = None
    version: int = 0
    checksum: Tensor | None = None  # of a content that is too large to be copied
    held: list[Any] | None = None  # what a list or the like holds: see `contents_of`
    trained: bool = False  # moved by us, or a view of such a weight: only the object is followed

    @property
    def restorable(self) -> bool:
        return self.content is not None or self.memory is None

    def has_moved(self, by_content: bool) -> bool:
        """Of an object that is still there; by PyTorch's count of writes, and by content if that is asked for."""
        if self.memory is None:
            return isinstance(self.value, GENERATORS)  # put back whether it has drawn or not
        if writes_into(self.value) != self.version or _stands_elsewhere(memory_of(self.value), self.memory):
            return True
        if not by_content:
            return False
        if self.content is None:
            return self.checksum is not None and not torch.equal(checksum(self.memory), self.checksum)
        return not torch.equal(self.memory, self.content)

    def written(self) -> bool:
        """Whether a pass has written into a trained weight, also where PyTorch's count of writes leaves it out."""
        assert self.checksum is not None
        moved = writes_into(self.value) != self.version
        return moved or not torch.equal(checksum(memory_of(self.value)), self.checksum)

    def place(self) -> Tensor:
        """Where a tensor's content belongs: after `value.data = other`, writing there would write into the other."""
        memory = memory_of(self.value)
        if self.memory is not None and _stands_elsewhere(memory, self.memory):
            self.value.data = memory = self.memory
        return memory

    def set_back(self) -> None:
        """A generator, to where it stood."""
        if isinstance(self.value, np.random.Generator):
            self.value.bit_generator.state = copy.deepcopy(self.content)
        elif isinstance(self.value, random.Random):
            self.value.setstate(self.content)
        else:
            self.value.set_state(self.content)


def state_of(generator: Any) -> Any:
    """Where one of `GENERATORS` stands."""
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def contents_of(container: Any) -> list[Any]:
    """What one of `CONTAINERS` holds, and what lists in it hold, for [`differ`]: its first 10,000 things, of arrays 100,000 numbers."""
    found, room = [], _MOST_NUMBERS
    for thing in islice(_things_in(container), _MOST):
        if isinstance(thing, np.ndarray) and thing.size <= room:
            room -= thing.size
            thing = thing.tobytes()
        found.append(thing)
    return found


def differ(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether contents are others: plain values by what they are, objects by whether they are still the same ones."""
    both = zip(before, now, strict=False)
    return len(before) != len(now) or not all(
        a is b or (isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b) for a, b in both
    )


def _things_in(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, np.ndarray) or not isinstance(value, CONTAINERS) or depth > _DEEPEST:
        yield value
        if isinstance(value, Tensor):
            yield writes_into(value)
        return
    yield len(value)
    for thing in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
        yield from _things_in(thing, depth + 1)


def memory_of(value: Tensor) -> Tensor:
    """
    The tensor's memory, without its history; of a `DTensor` this process's shard.

    `detach` would count what we write as writes into the tensor.
    """
    return (value.to_local() if isinstance(value, DTensor) else value).data


def writes_into(value: Tensor) -> int:
    """PyTorch's count of writes into a tensor."""
    return 0 if value.is_inference() else value._version


def storage_of(value: Tensor) -> int:
    """The address of the storage that a tensor stands in."""
    return memory_of(value).untyped_storage().data_ptr()


def write(to: Sequence[Tensor], contents: Sequence[Tensor]) -> None:
    """Copies tensors into others: those of a device and a dtype together, by few kernels."""
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for there, content in zip(to, contents, strict=True):
        theirs, ours = alike[there.device, there.dtype]
        theirs.append(there)
        ours.append(content)
    for theirs, ours in alike.values():
        torch._foreach_copy_(theirs, ours)


def checksum(memory: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers: no memory of the tensor's size."""
    if memory.is_complex():
        memory = torch.view_as_real(memory)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[memory.element_size()]
    return memory.view(whole).sum(dtype=torch.int64)


def _stands_elsewhere(memory: Tensor, before: Tensor) -> bool:
    return memory.data_ptr() != before.data_ptr() or memory.shape != before.shape or memory.dtype != before.dtype
