"""Gradients that are in `p.grad` when an update begins: of a loss of the user's own, say. The plain Trainer's pass adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..records import writes_into


class EarlierGradients:
    """
    Keeps them out of the ascent and the search, and adds them to XSAM's gradient, as the plain Trainer adds its own to them.

    Nothing is done, and nothing waits for the device, where `p.grad` is `None` as the Trainer's `zero_grad` leaves it.
    """

    def __init__(self):
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._left: list[tuple[Tensor, Tensor | None, int]] = []

    def before_pass(self, weights: Sequence[Tensor], first: bool, processes: int) -> None:
        """
        Args:
            weights (`Sequence[torch.Tensor]`): all that a pass gives a gradient.
            first (`bool`): whether an update begins with this pass.
            processes (`int`): how many there are, which do not average what is set aside.

        Raises:
            `NotImplementedError`: a gradient was changed between two micro-batches; or is there in one of several processes.
        """
        if not first:
            if any(weight.grad is not grad or _writes(grad) != writes for weight, grad, writes in self._left):
                raise NotImplementedError(
                    "The weights' gradient was changed between two micro-batches of an update, and XSAM makes it anew at moved weights: add your "
                    "own before the first one or in `on_pre_optimizer_step`, or set `gradient_accumulation_steps` to 1, or `rho` to 0."
                )
            return
        self._aside = [(weight, weight.grad) for weight in weights if weight.grad is not None]
        if processes > 1 and any(not isinstance(grad, DTensor) and grad.any() for _, grad in self._aside):
            raise NotImplementedError(
                "The weights had a gradient before the update, and XSAM would not average it over processes: add it in `on_pre_optimizer_step`, "
                "averaged, or make its loss a part of `compute_loss`, or set `rho` to 0."
            )
        for weight, _ in self._aside:
            weight.grad = None

    def after_pass(self, weights: Iterable[Tensor]) -> None:
        """Remembers what a pass left behind that is not the update's last."""
        self._left = [(weight, weight.grad, _writes(weight.grad)) for weight in weights]

    @torch.no_grad()
    def add(self) -> None:
        """Adds them to XSAM's gradient, at the end of the update."""
        for weight, earlier in self._aside:
            weight.grad = earlier if weight.grad is None else weight.grad.add_(earlier)
        self._aside, self._left = [], []


def _writes(grad: Tensor | None) -> int:
    return -1 if grad is None else writes_into(grad)
