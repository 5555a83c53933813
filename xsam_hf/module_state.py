"""What forward passes change beside the trained weights: found in the first update, and put back in every one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from .held_modules import modules_in
from .records import (
    CONTAINERS,
    GENERATORS,
    Record,
    checksum,
    contents_of,
    differ,
    memory_of,
    state_of,
    storage_of,
    write,
    writes_into,
)


logger = logging.getLogger(__name__)

_SMALL = 2**16  # bytes of a tensor that is copied in every update, whether it has moved or not
_MISSING = object()
_FOLLOWED = (Tensor, *GENERATORS, tuple, nn.Module)  # tuples, such as an LSTM's state, by name alone
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # hooks, the dictionaries of buffers ...: no module's own attributes


@dataclass(eq=False)
class _Place:
    """A dictionary in which a module or another object keeps things: its buffers, parameters, modules or attributes."""

    values: dict[str, Any]
    kind: str
    owner: str = ""
    names: frozenset[str] | None = None  # those that are followed; all of them by default
    left_alone: Callable[[str, Any], bool] | None = None  # but for these

    def items(self) -> Iterable[tuple[str, Any]]:
        if self.names is None:
            things = [(name, value) for name, value in self.values.items() if name not in _OF_EVERY_MODULE]
            return [thing for thing in things if not self.left_alone(*thing)] if self.left_alone else things
        return [(name, self.values[name]) for name in self.names if name in self.values]

    def called(self, name: str) -> str:
        return f"{self.owner}.{name}".lstrip(".")


_Key: TypeAlias = tuple[_Place, str]


@dataclass
class ModuleState:
    """What modules kept at one moment; made by [`StateFollower.capture`]."""

    follower: StateFollower
    by_content: bool
    records: dict[_Key, Record]
    places: frozenset[_Place]  # that were looked at: a module that a pass made later has others
    writes: list[int] | None = None  # into each trained weight, until the pass is looked at; none in the first update
    modes: list[bool] = field(default_factory=list)  # of the follower's modules: training or not

    def restore(self) -> None:
        """
        Puts back the objects that have been seen to move, by name, all contents that were copied, bit for bit, and every module's
        training mode.
        """
        self.follower.learn(self, by_content=False)
        for module, mode in zip(self.follower.modules, self.modes, strict=False):  # some may be new
            if module.training != mode:
                module.training = mode
        for place, name in self.follower.moving:
            if record := self.records.get((place, name)):
                place.values[name] = record.value
            elif place in self.places:
                place.values.pop(name, None)
        # Also of tensors whose count of writes stands still: see `capture`.
        copied = [record for record in self.records.values() if record.content is not None]
        tensors = [record for record in copied if isinstance(record.value, Tensor)]
        write([record.place() for record in tensors], [record.content for record in tensors])
        for record in copied:
            if not isinstance(record.value, Tensor):
                record.set_back()

    @property
    def complete(self) -> bool:
        """Whether all that has been seen to move can be put back."""
        return all([key not in self.records or self.records[key].restorable for key in self.follower.moving])


class StateFollower:
    """
    Follows what forward passes change beside the trained weights, so that every pass of an update can start alike.

    Followed by name, in all modules below the roots and in those that hang on their attributes: buffers of every kind, also
    those that a pass assigns anew, adds or removes; frozen weights; modules; tensors, tuples and random generators that are
    plain attributes; and whether a module trains or evaluates. The first update copies all of them, as far as they are not larger
    than the trained weights together: the optimizer's state is not there yet. Later updates copy those that have moved, and small
    ones. A large one that begins to move later makes that update a plain one.

    Other attributes (numbers, lists, objects of the user's own) stay as the last pass leaves them; see docs/compatibility.md.

    Args:
        modules (sequence of `torch.nn.Module`): the roots.
        others (sequence of `dict`): attributes of other objects, in which the same things are followed.
        trained (`Callable`, *optional*):
            Gives the weights that an update moves. Those of the roots that require a gradient by default.
        left_alone (`Callable`, *optional*):
            Of a name and a thing of a module, whether it is another library's, which moves it about and puts it back itself.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        others: Sequence[dict[str, Any]] = (),
        trained: Callable[[], Iterable[Tensor]] | None = None,
        left_alone: Callable[[str, Any], bool] | None = None,
    ):
        self.modules: dict[nn.Module, str] = {}  # with their names, in the order in which they were found
        self._places: list[_Place] = []
        self._left_alone = left_alone
        self._trained = trained or (lambda: [weight for root in modules for weight in root.parameters()])
        for root in modules:
            self._follow(root)
        self._places += [_Place(values, "others") for values in others]
        self.moving: set[_Key] = set()
        self._weights: dict[str, Tensor] = {}  # the trained ones, by name
        self._hooks: list[int] = []  # on each of them in the first update; tensor parallelism has such
        self._first = True

    def _follow(self, root: nn.Module) -> None:
        for module, owner in modules_in([root]).items():
            if module not in self.modules:
                self.modules[module] = owner
                kinds = ("buffers", module._buffers), ("parameters", module._parameters), ("modules", module._modules)
                self._places += [
                    _Place(values, kind, owner, left_alone=self._left_alone)
                    for kind, values in (*kinds, ("attributes", vars(module)))
                ]

    def capture(self, by_content: bool = False) -> ModuleState:
        """
        Notes all objects, and copies the contents of those that move or may begin to.

        Args:
            by_content (`bool`, *optional*, defaults to `False`):
                [`learn`] compares contents too, which waits for the device. Otherwise it goes by PyTorch's count of writes, in
                which writes through `tensor.data` and by other libraries' kernels are missing. True in the first update.
        """
        by_content = by_content or self._first
        records: dict[_Key, Record] = {}
        things = [(place, name, value) for place in self._places if place.values for name, value in place.items()]
        weights: list[Tensor] = []
        if any([isinstance(value, Tensor) for *_, value in things]):
            weights = [w for w in self._trained() if w.requires_grad and w.layout == torch.strided and not is_lazy(w)]
        ours = {storage_of(weight) for weight in weights} - {0}
        room = sum(weight.nbytes for weight in weights) if self._first else 0
        copied: list[tuple[Record, Tensor]] = []
        for place, name, value in things:
            if isinstance(value, Tensor):
                if is_lazy(value):
                    raise NotImplementedError(
                        f"{place.called(name)!r} belongs to a lazy module that has seen no batch yet, so that there is nothing to "
                        "put back between the passes of an update: call the model on a batch once before training."
                    )
                record = Record(value, version=writes_into(value))
                # What a pass has computed hangs in its graph, and trained weights are moved by us: only the object counts.
                if value.layout == torch.strided and value.is_leaf:
                    memory, record.trained = memory_of(value), storage_of(value) in ours
                    if record.trained:
                        if self._first and place.kind == "parameters" and not isinstance(value, DTensor):
                            record.checksum = checksum(memory)
                    elif (place, name) in self.moving or memory.nbytes <= max(_SMALL, room):
                        room -= memory.nbytes
                        record.memory = memory
                        copied.append((record, memory))
                    else:
                        record.memory, record.checksum = memory, checksum(memory) if by_content else None
            elif isinstance(value, GENERATORS):
                record = Record(value, state_of(value))
            else:
                told = self._first and place.kind == "attributes" and not name.startswith("_")
                record = Record(value, held=contents_of(value) if told and isinstance(value, CONTAINERS) else None)
            records[place, name] = record
        contents = [torch.empty_like(memory) for _, memory in copied]
        write(contents, [memory for _, memory in copied])
        for (record, _), content in zip(copied, contents, strict=True):
            record.content = content
        for name, before, now in zip(self._weights, self._hooks, self._count_hooks(), strict=True):
            if now > before:
                raise NotImplementedError(
                    f"{name!r} has a new hook that runs as soon as its gradient is there (`register_post_accumulate_grad_hook`), and "
                    "XSAM takes several gradients before the step: remove it, or set `rho` to 0."
                )
        writes = None if self._first else self._count_writes()
        modes = [module.training for module in self.modules]
        return ModuleState(self, by_content, records, frozenset(self._places), writes, modes)

    def learn(self, before: ModuleState, by_content: bool = True) -> None:
        """
        Finds out what has moved since `before`; by content too if that was captured for it.

        Raises:
            `NotImplementedError`: in the first update, if the pass replaced a parameter or wrote into a trained weight.
        """
        by_content, strangers, modules = by_content and before.by_content, [], []
        appeared = [(place, name) for place in before.places if place.values for name, _ in place.items()]
        for key in (*before.records, *(key for key in appeared if key not in before.records)):
            if key in self.moving:
                continue
            (place, name), record = key, before.records.get(key)
            value, old = place.values.get(name, _MISSING), _MISSING if record is None else record.value
            if value is old:
                if old is None:
                    continue
                assert record is not None
                if record.trained:
                    if record.checksum is not None and self._first and record.written():
                        refuse(f"writes into the trained weight {place.called(name)!r}")
                elif isinstance(old, Tensor) and old.layout != torch.strided and writes_into(old) != record.version:
                    refuse(f"writes into the sparse tensor {place.called(name)!r}")
                elif record.has_moved(by_content):
                    self.moving.add(key)
                elif record.held is not None and self._first and differ(record.held, contents_of(old)):
                    strangers.append(key)
            elif place.kind == "parameters":
                refuse(f"puts another parameter in the place of {place.called(name)!r}")
            elif place.kind in ("buffers", "modules") or isinstance(value, _FOLLOWED) or isinstance(old, _FOLLOWED):
                self.moving.add(key)
                if isinstance(value, nn.Module):
                    modules.append(value)
            else:
                strangers.append(key)
        if self._first:
            self._first = False
            self._weights = {
                place.called(name): record.value
                for (place, name), record in before.records.items()
                if record.checksum is not None and record.trained
            }
            self._hooks = self._count_hooks()
            self._forget_pass_state_of_still(before)
            named = {
                place.called(name)
                for place, name in strangers
                if place.kind == "attributes" and not name.startswith("_")
            }
            if named:
                logger.warning(
                    f"A forward pass changes {', '.join(sorted(named)[:5])}, and later passes of the update find it changed: if the "
                    "loss depends on it, keep it in a buffer, which XSAM puts back between passes."
                )
        for module in modules:
            self._follow(module)

    def refuse_writes(self, before: ModuleState) -> None:
        """
        Looks at PyTorch's counts of writes into trained weights after the first pass since `before`, in the second update and later.

        Raises:
            `NotImplementedError`: the pass wrote into one.
        """
        earlier, before.writes = before.writes, None  # XSAM's own writes come next
        if earlier is not None:
            for name, once, now in zip(self._weights, earlier, self._count_writes(), strict=True):
                if once != now:
                    refuse(f"writes into the trained weight {name!r}")

    def _count_writes(self) -> list[int]:
        return list(map(writes_into, self._weights.values()))

    def _count_hooks(self) -> list[int]:
        return [len(weight._post_accumulate_grad_hooks or ()) for weight in self._weights.values()]

    def _forget_pass_state_of_still(self, before: ModuleState) -> None:
        """
        From the second update on only looks at buffers, frozen weights, and attributes that are tensors or generators.

        Frozen weights are those of now: a weight that is frozen later was trained, and moved by nobody but the optimizer.
        """
        followed: dict[_Place, set[str]] = {}
        for place, name in self.moving:
            followed.setdefault(place, set()).add(name)
        for (place, name), record in before.records.items():
            empty = record.value is None and place.kind != "parameters"  # a tensor may come later
            if empty or record.content is not None or record.memory is not None:
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


def refuse(what: str) -> None:
    """Refuses what a pass does to a weight, in NotImplementedError's one sentence."""
    raise NotImplementedError(
        f"A forward pass {what}, which XSAM cannot put back between the passes of an update: change it after the optimizer's "
        "step (which has no place in a pass), in a callback's `on_step_end` for instance, or keep it in a buffer, or set `rho` to 0."
    )
