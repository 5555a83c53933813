"""What rows and texts show of a file that was misread, joined or damaged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.utils import logging

from tasks.command import cut


logger = logging.get_logger(__name__)


def refuse_misread(columns: Collection[str], read: Collection[str], name: str) -> None:
    """
    Refuses what `datasets` makes of a csv file whose header names a column twice, or whose rows have one field more than the header:
    pandas calls the second column `text.1`, or takes the first field for the rows' names, and each column has its neighbour's values.

    Args:
        columns (`Collection[str]`): as they were read.
        read (`Collection[str]`): those of them that are of use.
        name (`str`): the file's, for the message.

    Raises:
        `ValueError`: so it is.
    """
    if double := next((column for column in columns if column in read and f"{column}.1" in columns), None):
        raise ValueError(f"{name} has the column {double} twice: leave one of them, or name them differently.")
    if any(column.startswith("__index_level_") for column in columns):
        raise ValueError(
            f"{name} has rows with more fields than its header: is there a comma in a text that is not in quotation marks?"
        )


def is_header(row: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether a row names its own columns: files that were joined with their headers, a byte-order mark before the second included."""
    return all(str(row.get(column)).strip("\ufeff \t").casefold() == column.casefold() for column in columns)


def warn_of_lost_characters(texts: Iterable[str], where: str) -> None:
    """Warns where more than a hundredth of some texts have U+FFFD, which stands for a character that a wrong decoding has lost."""
    texts = list(texts)
    lost = [number for number, text in enumerate(texts, 1) if "\ufffd" in text]
    if len(lost) > len(texts) / 100:
        logger.warning(
            f"{where}: {len(lost)} of {len(texts)} texts have lost characters (U+FFFD), row {lost[0]} the first: decode the original as it "
            "was encoded."
        )


def refuse_swallowed_rows(rows: Iterable[Mapping[str, Any]], delimiter: str = ",") -> None:
    """
    Refuses a field of a csv file that holds rows: a quotation mark was not closed, and another one ends the text many lines later.

    Args:
        rows (`Iterable[Mapping]`): as they were read.
        delimiter (`str`, *optional*, defaults to `","`): of the file.

    Raises:
        `ValueError`: of three lines or more within a field three quarters or more have as many delimiters as a row.
    """
    for number, row in enumerate(rows, 1):
        for name, text in row.items():
            inside = text.split("\n")[1:-1] if isinstance(text, str) else []
            like_rows = sum(line.count(delimiter) == len(row) - 1 for line in inside)
            if len(inside) >= 3 and like_rows >= 0.75 * len(inside):
                raise ValueError(
                    f"row {number} has {like_rows} lines in its {name} that look like rows: is a quotation mark not closed? If they are text, "
                    "write blanks for its line feeds, or give json."
                )


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    An object of a JSON file; the `object_pairs_hook` of `json.loads`.

    Raises:
        `ValueError`: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a key twice: {cut(', '.join(name for name, _ in pairs))}.")
    return found
