"""What forward passes change beside the trained weights: found in the first update, and put back in every one."""

from __future__ import annotations

import copy
import logging
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
_CONTAINERS = (list, dict, set, deque)


@dataclass(eq=False)
class _Place:
    """A dictionary in which a module or another object keeps things: its buffers, its parameters or its attributes."""

    values: dict[str, Any]
    kind: str
    owner: str = ""
    names: list[str] | None = None  # those that are followed; all of them by default

    def look(self) -> dict[str, Any]:
        if self.names is None:
            return dict(self.values)
        return {name: self.values[name] for name in self.names if name in self.values}

    def called(self, name: str) -> str:
        return f"{self.owner}.{name}".lstrip(".")


_Key: TypeAlias = tuple[_Place, str]


@dataclass
class _Record:
    """A tensor or a generator as it was: its content, and for a tensor its memory and how often that had been written to."""

    content: Any = None
    memory: Tensor | None = None
    version: int = 0
    checksum: Tensor | None = None  # of a content that is too large to be copied


@dataclass
class ModuleState:
    """What modules kept at one moment; made by [`StateFollower.capture`]."""

    follower: StateFollower
    by_content: bool
    objects: dict[_Place, dict[str, Any]] = field(default_factory=dict)
    records: dict[_Key, _Record] = field(default_factory=dict)
    sizes: dict[_Key, int] = field(default_factory=dict)
    versions: dict[Tensor, int] = field(default_factory=dict)

    def restore(self) -> None:
        """Puts back what has been seen to move, up to now: the objects by name, and their contents bit for bit."""
        self.follower.learn(self, by_content=False)
        for place, name in self.follower.moving:
            value = self.objects[place].get(name, _MISSING)
            if value is _MISSING:
                place.values.pop(name, None)
                continue
            place.values[name] = value
            record = self.records.get((place, name))
            if record is not None and record.content is not None:
                _put_back(value, record)


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
        state = ModuleState(self, by_content or self._first, {place: place.look() for place in self._places})
        room = 0
        if self._first:
            for place, name, value in _all(state.objects):
                if isinstance(value, nn.Parameter) and value.requires_grad:
                    room += value.nbytes
                    if not isinstance(value, DTensor):  # FSDP writes into its own
                        state.versions[value] = value._version
                elif place.kind == "attributes" and isinstance(value, _CONTAINERS):
                    state.sizes[place, name] = len(value)
        for place, name, value in _all(state.objects):
            if isinstance(value, Tensor):
                # What a pass has computed hangs in its graph, and trained weights are moved by us: only the object is put back.
                if value.requires_grad:
                    continue
                record = _Record(memory=_part(value), version=value._version)
                size = _part(value).nbytes
                if (place, name) in self.moving or size <= max(_SMALL, room):
                    room -= size
                    record.content = _part(value).clone()
                elif state.by_content:
                    record.checksum = _checksum(_part(value))
            elif isinstance(value, _GENERATORS):
                record = _Record(_state_of(value))
            else:
                continue
            state.records[place, name] = record
        return state

    def learn(self, before: ModuleState, by_content: bool = True) -> bool:
        """
        Finds out what has moved since `before`; by content too if that was captured for it.

        Returns:
            `bool`: whether all of it can be put back. If not, no other pass of this update can start like the first.

        Raises:
            `NotImplementedError`: in the first update, if the pass replaced a parameter or wrote into a trained weight.
        """
        by_content, strangers = by_content and before.by_content, []
        for place, old in before.objects.items():
            now = place.look()
            for name in {**old, **now} if place.names is None else place.names:
                pair = old.get(name, _MISSING), now.get(name, _MISSING)
                if pair[0] is pair[1]:
                    size = before.sizes.get((place, name))
                    if size is not None and size != len(pair[0]):
                        strangers.append(place.called(name))
                elif place.kind == "parameters":
                    _refuse(f"puts another parameter in the place of {place.called(name)!r}")
                elif place.kind == "buffers" or any([isinstance(value, (Tensor, *_GENERATORS)) for value in pair]):
                    self.moving.add((place, name))
                elif place.kind == "attributes" and not name.startswith("_") and name != "training":
                    strangers.append(place.called(name))
        for (place, name), record in before.records.items():
            if (place, name) not in self.moving and _has_moved(before.objects[place][name], record, by_content):
                self.moving.add((place, name))
        for place, name, value in _all(before.objects) if self._first else ():
            if isinstance(value, nn.Parameter) and value._version != before.versions.get(value, value._version):
                _refuse(f"writes into the trained weight {place.called(name)!r}")
        if self._first:
            self._first = False
            self._forget_what_stands_still(before)
        if strangers:
            logger.warning(
                f"A forward pass changes {', '.join(sorted(strangers)[:5])}, and later passes of the update find it changed: if the "
                "loss depends on it, keep it in a buffer, which XSAM puts back between passes."
            )
        return all([key not in before.records or before.records[key].content is not None for key in self.moving])

    def _forget_what_stands_still(self, before: ModuleState) -> None:
        """Of attributes, only those that are tensors or generators are looked at from the second update on."""
        for place in self._places:
            if place.kind in ("attributes", "others"):
                names = [name for name in before.objects[place] if (place, name) in before.records]
                place.names = [*names, *(name for where, name in self.moving if where is place and name not in names)]
        self._places = [place for place in self._places if place.names is None or place.names]


_followers: WeakKeyDictionary[nn.Module, StateFollower] = WeakKeyDictionary()


def follower_of(module: nn.Module) -> StateFollower:
    """The follower of a module in a bare loop: always the same one, which knows what moved in earlier updates."""
    if module not in _followers:
        _followers[module] = StateFollower([module])
    return _followers[module]


def _all(objects: dict[_Place, dict[str, Any]]) -> Iterator[tuple[_Place, str, Any]]:
    for place, values in objects.items():
        for name, value in values.items():
            yield place, name, value


def _keeps_attributes(module: nn.Module) -> bool:
    """Whether a module may keep something in plain attributes: PyTorch's own have buffers for that."""
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
    return not all([cls.__module__.startswith("torch.") for cls in classes])


def _part(value: Tensor) -> Tensor:
    """The tensor's memory, without its history; of a `DTensor` this process's shard."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _put_back(value: Any, record: _Record) -> None:
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = copy.deepcopy(record.content)
    elif isinstance(value, random.Random):
        value.setstate(record.content)
    elif not isinstance(value, Tensor):
        value.set_state(record.content)
    else:
        memory = _part(value)
        if record.memory is not None and _stands_elsewhere(memory, record.memory):
            value.data = memory = record.memory  # after `value.data = other`: writing would write into the other
        memory.copy_(record.content)


def _has_moved(value: Any, record: _Record, by_content: bool) -> bool:
    if record.memory is None:
        return True  # a generator is put back whether it has drawn or not
    if value._version != record.version or _stands_elsewhere(_part(value), record.memory):
        return True
    if not by_content:
        return False
    if record.content is None:
        return record.checksum is not None and not torch.equal(_checksum(_part(value)), record.checksum)
    return not torch.equal(_part(value), record.content)


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
