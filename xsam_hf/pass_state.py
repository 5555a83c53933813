"""What a pass starts from: random numbers, and what modules keep. Captured before the first pass of an update, for the others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import XSAMArguments
from .module_state import ModuleState, StateFollower, follower_of
from .state import XSAMState


@dataclass(frozen=True)
class RandomState:
    """
    The state of Python's, NumPy's, PyTorch's and the current accelerator's generators.

    Every pass of an update must draw the same dropout masks: with independent masks the search for α follows the noise.
    """

    python: tuple
    numpy: dict
    torch: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """Reads the generators without advancing them."""
        device = _device_module()
        state = None if device is None else device.get_rng_state()
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), state)

    def restore(self) -> None:
        """Sets the generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.device is not None:
            _device_module().set_rng_state(self.device)


@dataclass(frozen=True)
class PassState:
    """
    Random numbers, and what modules keep beside the trained weights.

    Args:
        random ([`RandomState`]): the generators.
        modules ([`ModuleState`], *optional*): none if nobody said which modules there are.
    """

    random: RandomState
    modules: ModuleState | None

    @classmethod
    def capture(cls, follower: StateFollower | None, by_content: bool = False) -> PassState:
        """Reads both, without a change to either; `by_content` is [`StateFollower.capture`]'s."""
        return cls(RandomState.capture(), None if follower is None else follower.capture(by_content))

    def again(self) -> PassState:
        """The same, as it is now."""
        return PassState.capture(None if self.modules is None else self.modules.follower)

    def learn(self) -> bool:
        """Looks at what a pass has moved since ([`StateFollower.learn`]); returns whether all of it can be put back."""
        if self.modules is not None:
            self.modules.follower.refuse_writes(self.modules)
            self.modules.follower.learn(self.modules)
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether all that has been seen to move can be put back."""
        return self.modules is None or self.modules.complete

    def restore(self) -> None:
        """The next pass starts as the one before which this was captured."""
        self.random.restore()
        if self.modules is not None:
            self.modules.restore()


def pass_state_of(weights: Any, arguments: XSAMArguments, state: XSAMState) -> PassState:
    """
    Captures what the first pass of an update in a bare loop starts from; that of a model's modules if the weights are a model.

    The first two updates may wait for the device, to see what a pass moves: what moves at all moves there, also a teacher that
    begins as a copy of its student. An update with a search waits anyway.
    """
    follower = follower_of(weights) if isinstance(weights, nn.Module) else None
    searching = arguments.searches and state.search_due
    return PassState.capture(follower, by_content=searching or state.updates <= 2)


def _device_module():
    """`torch.cuda`, `torch.mps` ... if that device is in use; asking one that is not would wake it up."""
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return module if getattr(module, "is_initialized", lambda: True)() else None
