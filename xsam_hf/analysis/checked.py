"""Lengths and counts that a measure is asked for: numbers, and in range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_lengths(name: str, lengths: Sequence[float]) -> None:
    """
    Looks at lengths in an argument.

    Raises:
        `ValueError`: it is no sequence, there are none, or one is no number above 0 or not finite.
    """
    if isinstance(lengths, str) or not hasattr(lengths, "__len__"):
        raise ValueError(f"`{name}` is {lengths!r}: give a list of lengths above 0.")
    if not len(lengths):
        raise ValueError(f"`{name}` is empty: give one length above 0 or more.")
    if wrong := [length for length in lengths if not _is_length(length)]:
        raise ValueError(f"`{name}` has {wrong[0]!r}: give lengths above 0.")


def check_length(name: str, length: float) -> None:
    """
    Raises:
        `ValueError`: it is no number above 0, or not finite.
    """
    if not _is_length(length):
        raise ValueError(f"`{name}` is {length!r}: give a length above 0.")


def check_count(name: str, count: int, least: int = 1) -> None:
    """
    Raises:
        `ValueError`: it is no whole number, or there are too few.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or count < least:
        raise ValueError(f"`{name}` is {count!r}: give a whole number, {least} or more.")


def _is_length(value: Any) -> bool:
    return isinstance(value, Real | Tensor) and not isinstance(value, bool) and 0 < float(value) < math.inf
