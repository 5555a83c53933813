"""Texts and their labels from local files, row by row and exactly as they are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.command import cut, sentence
from tasks.tables import is_header, object_of, refuse_swallowed_rows


# GLUE's files have quotation marks that nothing closes.
DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
ENDINGS = (*DIALECTS, ".json", ".jsonl")
STARTS = {
    b"\xff\xfe": "it is in UTF-16: save it as UTF-8.",
    b"\xfe\xff": "it is in UTF-16: save it as UTF-8.",
    b"\x1f\x8b": "it is compressed by gzip: unpack it.",
    b"PK\x03\x04": "it is a zip archive, as spreadsheets are: unpack it, or save it as text.",
}


def read(file: Path, texts: Sequence[str], label: str) -> dict[str, list[str]]:
    """
    The columns `text`, `label`, and for pairs `pair`, of a file.

    Args:
        texts (`Sequence[str]`), label (`str`): what it calls them.

    Raises:
        `ValueError`: the file is of another kind, is no text in UTF-8, or a row lacks its text or its label.
    """
    if file.suffix not in ENDINGS:
        raise ValueError(f"{file} ends on {file.suffix or 'nothing'}: give a file in {', '.join(ENDINGS)}.")
    try:
        text = _text(file)
        rows = _table(text, DIALECTS[file.suffix]) if file.suffix in DIALECTS else _objects(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {sentence(error)}") from error
    if not rows:
        raise ValueError(f"{file} has no rows.")
    columns = dict(zip(("text", "pair"), texts, strict=False)) | {"label": label}
    found: dict[str, list[str]] = {name: [] for name in columns}
    for number, row in enumerate(rows, 1):
        if is_header(row, columns.values()):
            raise ValueError(
                f"{file}, row {number} is its header again: join files without the headers of all but the first."
            )
        for name, column in columns.items():
            if column not in row:
                field = "label_column_name" if name == "label" else "text_column_names"
                raise ValueError(
                    f"{file}, row {number} has no column {column!r}, but {cut(', '.join(map(repr, row)))}: see `{field}`."
                )
            value = row[column]
            if name == "label" and isinstance(value, bool | int):
                value = str(value)
            if not isinstance(value, str) or not value.strip() or not _is_whole(value):
                raise ValueError(
                    f"{file}, row {number}: its {column} is {cut(json.dumps(value))}, which is no {name}."
                )
            found[name].append(value)
    return found


def _text(file: Path) -> str:
    """
    Raises:
        `ValueError`: it begins as another kind of file does, or is not in UTF-8.
    """
    with file.open("rb") as opened:
        begins = opened.read(4)
    for start, told in STARTS.items():
        if begins.startswith(start):
            raise ValueError(told)
    return file.read_text(encoding="utf-8-sig")


def _is_whole(text: str) -> bool:
    """Whether there is no half of a character in it, which JSON can have and no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _table(text: str, dialect: dict[str, Any]) -> list[dict[str, str]]:
    csv.field_size_limit(len(text) + 1)
    header, divides = text.partition("\n")[0], dialect.get("delimiter", ",")
    if divides not in header and (other := next((sign for sign in ",;\t|" if sign in header), None)):
        raise ValueError(
            f"its header is {cut(header)}, which {other!r} divides and not {divides!r}: write the columns with {divides!r} between them."
        )
    lines = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        rows = _rows(lines)
        refuse_swallowed_rows(rows)
        return rows
    except csv.Error as error:  # which says little of a quotation mark that nothing closes
        raise ValueError(f"line {lines.line_num}: {error}; is a quotation mark not closed, or not doubled?") from error


def _rows(lines: Any) -> list[dict[str, str]]:
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise ValueError(f"a column of its header, {cut(', '.join(header))}, is there twice.")
    rows = []
    for line in lines:
        if line and len(line) != len(header):
            raise ValueError(f"line {lines.line_num} has {len(line)} fields, and the header {len(header)}.")
        if line:
            rows.append(dict(zip(header, line, strict=True)))
    return rows


def _objects(text: str) -> Sequence[dict[str, Any]]:
    if text.lstrip().startswith("["):
        rows = json.loads(text, object_pairs_hook=object_of)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line, object_pairs_hook=object_of)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected objects, one a line or in a list.")
    return rows
