"""What a caller gives `xsam_gradient`, looked at before the first pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .arguments import XSAMArguments
from .pass_state import PassState
from .state import XSAMState
from .weights import MovableWeights, Weights


logger = logging.getLogger(__name__)


def check_inputs(arguments: Any, state: Any) -> None:
    """
    Raises:
        `TypeError`: one is of another kind.
        `ValueError`: a hyperparameter, which may have been set since, is out of range.
    """
    _check_kinds(("arguments", arguments, XSAMArguments), ("state", state, XSAMState))
    arguments.check_method()


def with_weights(
    weights: Weights,
    theta: MovableWeights,
    gradient: Callable[[], Tensor],
    probe: Callable[[], Tensor] | None,
    before: PassState | None,
    arguments: XSAMArguments,
    state: XSAMState,
) -> Callable[[], Tensor]:
    """
    `gradient`, in the first two updates with a warning where it adds to a gradient that was left over.

    Raises:
        `TypeError`: `gradient` cannot be called, nor `probe` where one is needed.
        `ValueError`, `NotImplementedError`: in the first update, a weight that cannot be moved and put back.
    """
    _check_kinds(("gradient", gradient, Callable))
    if probe is not None or arguments.searches:
        _check_kinds(("probe", probe, Callable))
    if state.updates == 1:
        theta.refuse_unfit()
    # With a model its buffers are compared in these updates too.
    may_wait = isinstance(weights, nn.Module) or theta.device.type == "cpu"
    if state.updates > 2 or before is not None or not may_wait:
        return gradient
    left_over = theta.left_over()

    def checked() -> Tensor:
        loss = gradient()
        if any(weight.grad is earlier for weight, earlier in left_over):
            logger.warning(
                "Weights had a gradient before the update, which is now in that of the first pass and will be lost: call "
                "`optimizer.zero_grad()` after each step, and let `gradient` go over all micro-batches of an update."
            )
        return loss

    return checked if left_over else gradient


def _check_kinds(*given: tuple[str, Any, Any]) -> None:
    for name, value, kind in given:
        if not isinstance(value, kind):
            way_out = "a function that returns the loss" if kind is Callable else f"an {kind.__name__}"
            raise TypeError(f"`{name}` is of the type {type(value).__name__}: give {way_out}.")
