"""What forward passes change beside the trained weights: found in the first update, and put back in every one."""

from __future__ import annotations

import copy
import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


logger = logging.getLogger(__name__)

_SMALL = 2**16  # bytes of a tensor that is copied in every update, whether it has moved or not
_MISSING = object()
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FOLLOWED = (Tensor, *_GENERATORS)
_CONTAINERS = (list, dict, set, deque)


@dataclass(eq=False)
class _Place:
    """A dictionary in which a module or another object keeps things: its buffers, its parameters or its attributes."""

    values: dict[str, Any]
    kind: str
    owner: str = ""
    names: frozenset[str] | None = None  # those that are followed; all of them by default

    def items(self) -> Iterable[tuple[str, Any]]:
        if self.names is None:
            return self.values.items()
        return [(name, self.values[name]) for name in self.names if name in self.values]

    def called(self, name: str) -> str:
        return f"{self.owner}.{name}".lstrip(".")


_Key: TypeAlias = tuple[_Place, str]


@dataclass
class _Record:
    """A thing as it was. Of a tensor or a generator its content too, and where a tensor stood and how often it had been written to."""

    value: Any
    content: Any = None
    memory: Tensor | None = None
    version: int = 0
    checksum: Tensor | None = None  # of a content that is too large to be copied
    size: int | None = None  # of a list or the like

    @property
    def restorable(self) -> bool:
        return self.content is not None or self.memory is None


@dataclass
class ModuleState:
    """What modules kept at one moment; made by [`StateFollower.capture`]."""

    follower: StateFollower
    by_content: bool
    records: dict[_Key, _Record]

    def restore(self) -> None:
        """Puts back what has been seen to move, up to now: the objects by name, and their contents bit for bit."""
        self.follower.learn(self, by_content=False)
        for place, name in self.follower.moving:
            record = self.records.get((place, name))
            if record is None:
                place.values.pop(name, None)
                continue
            place.values[name] = record.value
            if record.content is not None:
                _put_back(record)

    @property
    def complete(self) -> bool:
        """Whether all that has been seen to move can be put back."""
        return all([key not in self.records or self.records[key].restorable for key in self.follower.moving])


class StateFollower:
    """
    Follows what forward passes change beside the trained weights, so that every pass of an update can start alike.

    Followed by name, in all modules below the roots: buffers of every kind, also those that a pass assigns anew, adds or
    removes; frozen weights; tensors and random generators that are plain attributes. The first update copies all of them, as
    far as they are not larger than the trained weights together: the optimizer's state is not there yet. Later updates copy
    those that have moved, and small ones. A large one that begins to move later makes that update a plain one.

    Other attributes (numbers, lists, objects of the user's own) stay as the last pass leaves them; see docs/compatibility.md.

    Args:
        modules (sequence of `torch.nn.Module`): the roots.
        others (sequence of `dict`): attributes of other objects, whose tensors and random generators are followed too.
    """

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[dict[str, Any]] = ()):
        owners: dict[nn.Module, str] = {}
        for root in modules:
            for name, module in root.named_modules():
                owners.setdefault(module, name)
        self._places = [_Place(module._buffers, "buffers", owner) for module, owner in owners.items()]
        self._places += [_Place(module._parameters, "parameters", owner) for module, owner in owners.items()]
        for module, owner in owners.items():
            if _keeps_attributes(module):
                self._places.append(_Place(vars(module), "attributes", owner))
        self._places += [_Place(values, "others") for values in others]
        self.moving: set[_Key] = set()
        self._first = True

    def capture(self, by_content: bool = False) -> ModuleState:
        """
        Notes all objects, and copies the contents of those that move or may begin to.

        Args:
            by_content (`bool`, *optional*, defaults to `False`):
                [`learn`] compares contents too, which waits for the device. Otherwise it goes by PyTorch's count of writes,
                which leaves out those through `tensor.data` and of other libraries' kernels. True in the first update.
        """
        by_content = by_content or self._first
        records: dict[_Key, _Record] = {}
        room = sum(weight.nbytes for weight in self._trained()) if self._first else 0
        for place in self._places:
            for name, value in place.items():
                if isinstance(value, Tensor):
                    record = _Record(value, version=value._version)
                    # What a pass has computed hangs in its graph, and trained weights are moved by us: only the object counts.
                    if not value.requires_grad:
                        record.memory = memory = _memory(value)
                        if (place, name) in self.moving or memory.nbytes <= max(_SMALL, room):
                            room -= memory.nbytes
                            record.content = memory.clone()
                        elif by_content:
                            record.checksum = _checksum(memory)
                elif isinstance(value, _GENERATORS):
                    record = _Record(value, _state_of(value))
                else:
                    record = _Record(value, size=len(value) if isinstance(value, _CONTAINERS) else None)
                records[place, name] = record
        return ModuleState(self, by_content, records)

    def learn(self, before: ModuleState, by_content: bool = True) -> None:
        """
        Finds out what has moved since `before`; by content too if that was captured for it.

        Raises:
            `NotImplementedError`: in the first update, if the pass replaced a parameter or wrote into a trained weight.
        """
        by_content, strangers = by_content and before.by_content, []
        appeared = [(place, name) for place in self._places for name, _ in place.items()]
        for key in (*before.records, *(key for key in appeared if key not in before.records)):
            if key in self.moving:
                continue
            (place, name), record = key, before.records.get(key)
            value, old = place.values.get(name, _MISSING), _MISSING if record is None else record.value
            if value is old:
                assert record is not None
                if place.kind == "parameters" and old is not None and old.requires_grad:
                    if self._first and not isinstance(old, DTensor) and old._version != record.version:
                        _refuse(f"writes into the trained weight {place.called(name)!r}")
                elif _has_moved(record, by_content):
                    self.moving.add(key)
                elif record.size is not None and self._first and len(old) != record.size:
                    strangers.append(key)
            elif place.kind == "parameters":
                _refuse(f"puts another parameter in the place of {place.called(name)!r}")
            elif place.kind == "buffers" or isinstance(value, _FOLLOWED) or isinstance(old, _FOLLOWED):
                self.moving.add(key)
            else:
                strangers.append(key)
        if self._first:
            self._first = False
            self._forget_pass_state_of_still(before)
            named = {
                place.called(name)
                for place, name in strangers
                if place.kind == "attributes" and not name.startswith("_") and name != "training"
            }
            if named:
                logger.warning(
                    f"A forward pass changes {', '.join(sorted(named)[:5])}, and later passes of the update find it changed: if the "
                    "loss depends on it, keep it in a buffer, which XSAM puts back between passes."
                )

    def _trained(self) -> Iterator[nn.Parameter]:
        for place in self._places:
            if place.kind == "parameters":
                yield from (weight for weight in place.values.values() if weight is not None and weight.requires_grad)

    def _forget_pass_state_of_still(self, before: ModuleState) -> None:
        """
        From the second update on only looks at buffers, frozen weights, and attributes that are tensors or generators.

        Frozen weights are those of now: a weight that is frozen later was trained, and moved by nobody but the optimizer.
        """
        followed: dict[_Place, set[str]] = {}
        for place, name in self.moving:
            followed.setdefault(place, set()).add(name)
        for (place, name), record in before.records.items():
            if record.content is not None or record.memory is not None:
                followed.setdefault(place, set()).add(name)
        for place in self._places:
            if place.kind != "buffers":
                place.names = frozenset(followed.get(place, ()))
        self._places = [place for place in self._places if place.names is None or place.names]


_followers: WeakKeyDictionary[nn.Module, StateFollower] = WeakKeyDictionary()


def follower_of(module: nn.Module) -> StateFollower:
    """The follower of a module in a bare loop: always the same one, which knows what moved in earlier updates."""
    if module not in _followers:
        _followers[module] = StateFollower([module])
    return _followers[module]


def _keeps_attributes(module: nn.Module) -> bool:
    """Whether a module may keep something in plain attributes: PyTorch's own have buffers for that."""
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
    return not all([cls.__module__.startswith("torch.") for cls in classes])


def _memory(value: Tensor) -> Tensor:
    """The tensor's memory, without its history; of a `DTensor` this process's shard."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _put_back(record: _Record) -> None:
    value = record.value
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = copy.deepcopy(record.content)
    elif isinstance(value, random.Random):
        value.setstate(record.content)
    elif not isinstance(value, Tensor):
        value.set_state(record.content)
    else:
        memory = _memory(value)
        if record.memory is not None and _stands_elsewhere(memory, record.memory):
            value.data = memory = record.memory  # after `value.data = other`: writing would write into the other
        memory.copy_(record.content)


def _has_moved(record: _Record, by_content: bool) -> bool:
    if record.memory is None:
        return isinstance(record.value, _GENERATORS)  # put back whether it has drawn or not
    if record.value._version != record.version or _stands_elsewhere(_memory(record.value), record.memory):
        return True
    if not by_content:
        return False
    if record.content is None:
        return record.checksum is not None and not torch.equal(_checksum(record.memory), record.checksum)
    return not torch.equal(record.memory, record.content)


def _checksum(memory: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers: no memory of the tensor's size."""
    if memory.is_complex():
        memory = torch.view_as_real(memory)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[memory.element_size()]
    return memory.view(whole).sum(dtype=torch.int64)


def _stands_elsewhere(memory: Tensor, before: Tensor) -> bool:
    return memory.data_ptr() != before.data_ptr() or memory.shape != before.shape or memory.dtype != before.dtype


def _refuse(what: str) -> None:
    raise NotImplementedError(
        f"A forward pass {what}, which XSAM cannot put back between the passes of an update: change it after the optimizer's "
        "step, in a callback's `on_step_end` for instance, or keep it in a buffer, or set `rho` to 0."
    )
