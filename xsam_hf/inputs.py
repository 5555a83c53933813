"""What a caller gives `xsam_gradient`, looked at before the first pass."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor, nn

from .arguments import XSAMArguments
from .module_state import refuse
from .pass_state import PassState
from .state import XSAMState
from .trainable import Weights
from .unread import warn_of_unread
from .weights import MovableWeights


logger = logging.getLogger(__name__)


def with_weights(
    weights: Weights,
    theta: MovableWeights,
    gradient: Callable[[], Tensor],
    probe: Callable[[], Tensor] | None,
    before: PassState | None,
    arguments: XSAMArguments,
    state: XSAMState,
    ascend: bool,
) -> Callable[[], Tensor]:
    """
    `gradient`, with a look at whether it writes into the weights, and in the first two updates with a warning where it adds to a
    gradient that was left over.

    Raises:
        `TypeError`: `gradient` or `probe` cannot be called; without a search and `slope_max` nobody asks for a `probe`.
        `ValueError`: the state's α lies beyond the end of the search.
        `ValueError`, `NotImplementedError`: in the first update, a weight that cannot be moved and put back.
    """
    probed = arguments.rho > 0 and (arguments.searches or arguments.gradient_scale == "slope_max")
    for name, given in {"gradient": gradient, **({"probe": probe} if probed or probe is not None else {})}.items():
        if not callable(given):
            raise TypeError(
                f"`{name}` is a {type(given).__name__}: give a function that takes nothing and returns the loss of the update batch at the "
                "weights as they stand."
            )
    if state.updates == 1:
        theta.refuse_unfit()
        if before is None:  # XSAMTrainer has told them
            warn_of_unread(arguments)
    if arguments.searches and state.alpha > max(1.0, arguments.alphas[-1]):  # 1 is where it starts
        raise ValueError(
            f"The state's `alpha` is {state.alpha:g}, beyond `alpha_max` ({arguments.alpha_max:g}), the end of the search: go on with the "
            "`alpha_max` of the run that found it, or with another checkpoint."
        )
    if ascend and before is None and not isinstance(weights, nn.Module):  # a module is followed: see module_state.py
        gradient = _without_writes(theta, gradient)
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


def _without_writes(theta: MovableWeights, gradient: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`gradient`, which raises NotImplementedError where it wrote into a weight, by PyTorch's counts of writes: waits for nothing."""

    def checked() -> Tensor:
        before = theta.count_writes()
        loss = gradient()
        for name, writes in theta.count_writes().items():
            if writes != before[name]:
                refuse(f"writes into the trained weight {name!r}")
        return loss

    return checked
