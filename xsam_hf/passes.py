"""The passes of one update: each starts from the state in which the first began, and Ctrl-C falls into none of what is between."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .pass_state import PassState
from .weights import MovableWeights


_Result = TypeVar("_Result")


class Stoppable(Protocol):
    """Runs a pass, which Ctrl-C may end."""

    def __call__(self, one_pass: Callable[[], _Result]) -> _Result: ...


class Passes:
    """
    Runs `gradient` and `probe` of one update, all from the same random numbers and module state.

    Args:
        gradient (`Callable`), probe (`Callable`): see `xsam_gradient`.
        before ([`PassState`]): what the first pass starts from.
    """

    def __init__(self, gradient: Callable[[], Tensor], probe: Callable[[], Tensor], before: PassState):
        self._gradient, self._probe, self._before = gradient, probe, before
        self._stoppable: Stoppable = _at_once
        self._probe_with_gradients = False

    def first(self) -> Tensor:
        """
        The pass at θ_0, which leaves random numbers and module state as plain training would; returns its loss.

        Raises:
            `TypeError`, `ValueError`: `gradient` returns no loss, a real 0-dim tensor.
        """
        self._first = loss = _loss("gradient", self._gradient())
        self._after = self._before.again()
        return loss

    @property
    def repeatable(self) -> bool:
        """Whether all that the first pass has moved can be put back for the others."""
        return self._before.learn()

    @contextmanager
    def repeated(self, theta: MovableWeights) -> Iterator[None]:
        """
        The block in which weights move. At its end, whatever happens inside, they are θ_0 again, bit for bit, and random
        numbers and module state are what the first pass left; after an exception there are no gradients.
        """
        try:
            with interrupts_held() as self._stoppable, torch.no_grad(), theta.kept(), self._modules_kept():
                yield
        except BaseException:
            theta.drop_gradients()
            raise
        finally:
            self._after.random.restore()
            torch.clear_autocast_cache()

    def gradient(self) -> Tensor:
        """
        Leaves the gradient at the weights as they stand in `p.grad`, and returns the loss.

        Raises:
            `ValueError`: it is the first pass's loss.
            `NotImplementedError`: the pass moved a large tensor that the first one had left alone.
        """
        with torch.enable_grad():
            loss = _loss("gradient", self._again(self._gradient))
        if _place(loss) == _place(self._first):
            raise ValueError(
                "`gradient` returned the same tensor at moved weights as at those of before, as if it were one pass: let it compute the loss anew "
                "each time."
            )
        # A teacher that is a copy of its student moves in no pass at θ_0.
        if not self._before.learn():
            raise NotImplementedError(
                "A forward pass at moved weights writes into a large buffer or frozen weight that the first pass of the update left "
                "alone, so that XSAM has no copy of it to put back: write into it in every pass, or set `rho` to 0."
            )
        return loss

    def loss(self, theta: MovableWeights) -> Tensor:
        """
        The loss at the weights as they stand: a forward pass alone.

        Without gradients if it can be. A loss that differentiates inside (forces, gradient penalties) needs them.
        """
        with theta.gradients_aside():
            if not self._probe_with_gradients:
                try:
                    return _loss("probe", self._again(self._probe))
                except RuntimeError as error:
                    if "require grad" not in str(error):
                        raise
                    self._probe_with_gradients = True
            with torch.enable_grad():
                return _loss("probe", self._again(self._probe)).detach()

    def _again(self, one_pass: Callable[[], Tensor]) -> Tensor:
        self._before.restore()
        torch.clear_autocast_cache()  # an enclosing autocast region keeps casts of weights that have moved since
        return self._stoppable(one_pass)

    @contextmanager
    def _modules_kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            for state in (self._before, self._after):  # the latter has no copy of what only later passes moved
                if state.modules is not None:
                    state.modules.restore()


@contextmanager
def interrupts_held() -> Iterator[Stoppable]:
    """
    Lets Ctrl-C stop a pass, and holds it back between two passes until the next one or the end of the block.

    Weights are written back between passes, which an interrupt must not cut short. The whole block is guarded, since an
    interrupt may also fall between a failing pass and the first line of its `finally`. Python handles signals in the main
    thread alone, so that there is nothing to hold back in others.

    Yields:
        [`Stoppable`]: runs a pass, which Ctrl-C may end.
    """
    earlier = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(earlier):
        yield _at_once
        return
    # Not variables: up to Python 3.12 the callback of a profiler or debugger sets those of its frame back to what they were
    # before it (PEP 667), and with them what a handler has changed meanwhile.
    held = SimpleNamespace(in_pass=False, waiting=False)

    def on_interrupt(number, frame) -> None:
        held.waiting = not held.in_pass
        if held.in_pass:
            try:
                earlier(number, frame)
            except BaseException:
                held.in_pass = False  # the pass ends here; Python 3.10 may be in its `finally` below already
                raise

    def stoppable(one_pass: Callable[[], _Result]) -> _Result:
        held.in_pass = True
        try:
            if held.waiting:
                signal.raise_signal(signal.SIGINT)
            return one_pass()
        finally:
            # Python handles signals at calls and at backward jumps only: there is neither between the pass and this line.
            held.in_pass = False

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stoppable
    finally:
        signal.signal(signal.SIGINT, earlier)
        if held.waiting:
            signal.raise_signal(signal.SIGINT)


def _loss(name: str, returned: Any) -> Tensor:
    """What a pass has returned, if it is a loss."""
    if not isinstance(returned, Tensor):
        raise TypeError(f"`{name}` returned {type(returned).__name__}: let it return the loss, a 0-dim tensor.")
    if returned.numel() != 1:
        raise ValueError(
            f"`{name}` returned a tensor of shape {tuple(returned.shape)}: let it return the loss as one number, its mean for instance."
        )
    if not returned.is_floating_point():
        raise TypeError(f"`{name}` returned a loss of {returned.dtype}: let it return a real number.")
    return returned if returned.ndim == 0 else returned.reshape(())


def _place(loss: Tensor) -> tuple[StorageWeakRef, int]:
    """Where a number stands, also one that is pretended."""
    return StorageWeakRef(loss.untyped_storage()), int(loss.storage_offset())


def _at_once(one_pass: Callable[[], _Result]) -> _Result:
    return one_pass()
