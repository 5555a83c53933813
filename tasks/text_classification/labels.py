"""Labels that are classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from decimal import Decimal, InvalidOperation

from tasks.command import cut


def refuse_alike(labels: Iterable[str], file: str | None) -> None:
    """
    Refuses two labels that look alike or differ in a blank or in capitals, or one number written in two ways.

    Raises:
        `ValueError`: there are such; it names them.
    """
    known: dict[str | Decimal, str] = {}
    for label in sorted(labels):
        # One letter may be written in two ways in Unicode, and some signs have no width.
        letters = unicodedata.normalize("NFKC", label).strip().casefold()
        bare = "".join(letter for letter in letters if unicodedata.category(letter) != "Cf")
        other = known.setdefault(_value(bare), label)
        if other != label:
            raise ValueError(
                f"`train_file` {file} has the labels {cut(repr(other))} and {cut(repr(label))}, which would be two classes: write them alike."
            )


def refuse_values(labels: Collection[str], file: str | None) -> None:
    """
    Refuses numbers that are no classes.

    Raises:
        `ValueError`: all labels are numbers, and one is not written as a whole one.
    """
    numbers = [label for label in labels if label[:1] not in "tTfF" and isinstance(_value(label.strip()), Decimal)]
    decimal = next((label for label in sorted(numbers) if not label.strip().lstrip("+-").isdecimal()), None)
    if decimal is not None and len(numbers) == len(labels):
        raise ValueError(
            f"`train_file` {file} has the label {cut(repr(decimal))}, and a label is a name or a whole number: this task knows classes, and "
            "no values to predict."
        )


def _value(label: str) -> str | Decimal:
    """The number that a label is, 1 and 0 for true and false; any other label as it is."""
    try:
        # Exact, where a float would take two long numbers for one. Python reads 1_0 as 10, and nobody else does.
        number = Decimal({"true": "1", "false": "0"}.get(label, label.replace("_", "?")))
    except InvalidOperation:
        return label
    return number if number.is_finite() else label
