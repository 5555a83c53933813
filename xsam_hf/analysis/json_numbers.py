"""Numbers that are not finite, which JSON does not have."""

import math
from typing import Any


def strict(value: Any) -> Any:
    """Numbers that are not finite become null, which JSON has."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(value: Any) -> Any:
    """Null in a list of numbers is NaN again."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [math.nan if inner is None else numbers(inner) for inner in value]
    return value
