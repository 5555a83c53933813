"""What the updates since the last log saw, added up on the device: reading it waits for the log."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import XSAMArguments
from ..state import XSAMState, XSAMUpdate


_SHARE = "xsam/curvature_share"
_NAMES = ["xsam/angle", "xsam/sharpness", "xsam/grad_norm_first", "xsam/grad_norm_last", _SHARE]


class UpdateSums:
    """Running sums of the numbers of [`XSAMUpdate`], without a host synchronisation before they are read."""

    def __init__(self):
        self._sums: Tensor | None = None
        self._passes: list[float] = []

    def add(self, passes: float, update: XSAMUpdate | None = None) -> None:
        """Counts an update and its passes (forward and backward); one without XSAM saw nothing."""
        self._passes.append(passes)
        if update is None:
            return
        sharpness = update.last_loss - update.loss
        # ½⟨ĝ_0, g_1 − g_0⟩/‖g_0‖: how much the loss rises over its slope, as a share of it.
        share = (update.grad_norm_last * update.angle.cos() / update.grad_norm_first - 1) / 2
        seen = [update.angle, sharpness, update.grad_norm_first, update.grad_norm_last, share, update.fell_back]
        values = torch.stack([value.to(update.loss.device, torch.float32) for value in seen])
        finite = torch.isfinite(values)
        sums = torch.stack([values.masked_fill(~finite, 0), finite.float()])
        self._sums = sums if self._sums is None else self._sums.add_(sums)

    def read(
        self, arguments: XSAMArguments, state: XSAMState, average: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """
        The log's entries, and a new beginning; none if there was no update.

        Args:
            arguments ([`XSAMArguments`]), state ([`XSAMState`]): α and the last search are in them.
            average (`Callable`): means a tensor over all processes, all of which read at once.
        """
        logs: dict[str, float] = {}
        if self._passes:
            logs["xsam/passes"] = sum(self._passes) / len(self._passes)
        if self._sums is not None:
            if arguments.direction == "arc":
                logs["xsam/alpha"] = state.alpha if arguments.alpha is None else arguments.alpha
            sums, counts = average(self._sums).tolist()
            logs |= {name: total / count for name, total, count in zip(_NAMES, sums, counts, strict=False) if count}
            if not _is_sam(arguments):
                logs.pop(_SHARE, None)
            for name in ("search_gain", "alpha_at_edge", "search_noise"):
                if (value := getattr(state, name)) is not None:
                    logs[f"xsam/{name}"] = float(value)
            if sums[-1]:
                logs["xsam/fallbacks"] = sums[-1]
        self._sums, self._passes = None, []
        return logs


def _is_sam(arguments: XSAMArguments) -> bool:
    """Whether the ascent is one step along the gradient of the whole batch, so that the angle is between g_0 and g_1."""
    return arguments.perturbation == "sam" and arguments.ascent_steps == 1 and arguments.ascent_fraction == 1
