"""What a run logged of XSAM over training (Fig. 13 and 14 of the paper)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias


# By key: the updates, and the values logged there.
Curves: TypeAlias = "dict[str, tuple[list[int], list[float]]]"

_KEYS = ("xsam/alpha", "xsam/angle", "xsam/grad_norm_first", "xsam/grad_norm_last")


def training_curves(folder: str | Path) -> Curves:
    """
    α, the angle ψ (radians) and the norms of the first and the last gradient, from `trainer_state.json`.

    Args:
        folder (`str` or `Path`): a checkpoint, or a run's folder. One without the file, or of a plain Trainer, has no curves.
    """
    try:
        history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError):
        return {}
    found: Curves = {}
    for key in _KEYS:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            found[key] = (list(steps), list(values))
    return found
