"""Texts and their labels: local files that are read exactly, and how they are split and cut into tokens."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from tasks.command import cut, sentence
from tasks.identity import fingerprint
from tasks.tables import is_header, object_of, refuse_swallowed_rows, warn_of_lost_characters


logger = logging.get_logger(__name__)
SPLITS = ("train", "validation", "test")
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


@dataclass
class DataArguments:
    """Which texts, and which of their columns."""

    train_file: str | None = field(
        default=None, metadata={"help": "Texts to train on: .csv or .tsv with a header, .json or .jsonl."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Texts that are scored during training. Default: a share of `train_file`."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Texts that are scored at the end."})
    validation_share: float = field(
        default=0.1,
        metadata={"help": "Share of the training texts that is held out if there is no `validation_file`. 0: none."},
    )
    text_column_names: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "The column of the texts, or the two of pairs."}
    )
    label_column_name: str = field(default="label", metadata={"help": "The column of the labels."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text; the rest is cut off."})

    def __post_init__(self):
        if self.train_file is None:
            raise ValueError(f"`train_file` is missing: give a file in {', '.join(ENDINGS)}.")
        if self.validation_file is not None and self.validation_share not in (0, 0.1):
            raise ValueError(
                f"`validation_share` is {self.validation_share}, and `validation_file` is given: leave one of them out."
            )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"`validation_share` is {self.validation_share}: give a share from 0 to below 1.")
        if len(self.text_column_names) > 2:
            raise ValueError(f"`text_column_names` is {' '.join(self.text_column_names)}: give one column, or two.")
        columns = [*self.text_column_names, self.label_column_name]
        if len(set(columns)) < len(columns):
            raise ValueError(
                f"`text_column_names` is {' '.join(self.text_column_names)}, and `label_column_name` {self.label_column_name}: each "
                "has to be a column of its own, or the text would hold its label."
            )
        if self.max_seq_length < 3:
            raise ValueError(f"`max_seq_length` is {self.max_seq_length}: give 3 or more.")


@dataclass
class Corpus:
    """
    The texts by split, and the labels' names, whose places are the classes.

    Attributes:
        splits (`dict[str, Dataset]`): `train`, and `validation` and `test` if there are any; columns `text`, `pair`, `label` (a name).
        names (`list[str]`): in the order of the numbers if all are numbers, of the alphabet otherwise.
    """

    splits: dict[str, Dataset]
    names: list[str]

    def encode(self, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Dataset]:
        """What a model sees: token ids, at most `length` of them, and the classes as `labels`."""

        def encode(rows: dict[str, list]) -> dict[str, Any]:
            texts = [rows[name] for name in ("text", "pair") if name in rows]
            return {
                **tokenizer(*texts, truncation=True, max_length=length),
                "labels": list(map(self.names.index, rows["label"])),
            }

        return {
            name: split.map(encode, batched=True, remove_columns=split.column_names)
            for name, split in self.splits.items()
        }


def prints(encoded: dict[str, Dataset]) -> dict[str, str]:
    """A [`~tasks.identity.fingerprint`] of each split's tokens and labels."""
    return {name: fingerprint(*split["input_ids"], split["labels"]) for name, split in encoded.items()}


def load(task: DataArguments) -> Corpus:
    """
    Reads the files. The held-out texts have equal shares of every class and are always the same.

    Raises:
        `ValueError`: a file cannot be read, a row lacks its text or its label, or a label is not among the training's.
    """
    files = {split: getattr(task, f"{split}_file") for split in SPLITS}
    given = [str(Path(file).resolve()) for file in files.values() if file is not None]
    if len(set(given)) < len(given):
        raise ValueError("Two of `train_file`, `validation_file` and `test_file` are the same: leave one of them out.")
    splits = {name: Dataset.from_dict(read(Path(file), task)) for name, file in files.items() if file is not None}
    found = set(splits["train"]["label"])
    _refuse_labels_alike(found, task.train_file)
    _refuse_values(found, task.train_file)
    names = sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    if len(names) < 2:
        raise ValueError(
            f"`train_file` {task.train_file} has one label only, {cut(names[0])}: give two classes or more."
        )
    if len(names) > max(20, len(splits["train"]) / 2):
        raise ValueError(
            f"`train_file` {task.train_file} has {len(names)} labels for {len(splits['train'])} texts: is `label_column_name` "
            f"({task.label_column_name}) right?"
        )
    for name, split in splits.items():
        warn_of_lost_characters(split["text"], f"`{name}_file` {files[name]}")
        if unknown := sorted(set(split["label"]) - found):
            raise ValueError(
                f"`{name}_file` {files[name]} has the label {cut(unknown[0])}, which no training text has."
            )
    if "validation" not in splits and task.validation_share:
        label, times = min(Counter(splits["train"]["label"]).items(), key=lambda pair: pair[1])
        if times < 2:
            raise ValueError(
                f"`train_file` {task.train_file} has the label {cut(repr(label))} once, and texts of each label are held out: give more of it, or "
                "set `validation_share` to 0."
            )
        whole = splits["train"].add_column("class", list(map(names.index, splits["train"]["label"])))
        try:
            parts = whole.class_encode_column("class").train_test_split(
                task.validation_share, seed=0, stratify_by_column="class"
            )
        except ValueError as error:
            raise ValueError(
                f"`validation_share` is {task.validation_share}, of {len(whole)} training texts: {sentence(error)}"
            ) from error
        splits["train"], splits["validation"] = (parts[part].remove_columns("class") for part in ("train", "test"))
    _warn_of_repetitions(splits)
    return Corpus(splits, names)


def _refuse_labels_alike(labels: Iterable[str], file: str | None) -> None:
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


def _refuse_values(labels: Collection[str], file: str | None) -> None:
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


def _warn_of_repetitions(splits: Mapping[str, Dataset]) -> None:
    """Says so if more than a tenth of the texts that are scored are trained on or there before, or those of the test chosen by."""

    def texts(split: Dataset) -> list[tuple[str, ...]]:
        return list(zip(*(split[name] for name in ("text", "pair") if name in split.column_names), strict=True))

    of = {name: texts(split) for name, split in splits.items()}
    trained, chosen = set(of.pop("train")), set(of.get("validation", ()))
    for name, rows in of.items():
        again = sum(text in trained for text in rows)
        if again > len(rows) / 10:
            logger.warning(
                f"{again} of the {len(rows)} {name} texts are training texts too: their scores say what was learnt by heart."
            )
        if (twice := len(rows) - len(set(rows))) > len(rows) / 10:
            logger.warning(
                f"{twice} of the {len(rows)} {name} texts are copies of others, and count again: are the rows doubled?"
            )
    again = sum(text in chosen for text in of.get("test", ()))
    if again > min(len(of.get("test", ())), len(chosen)) / 10:
        logger.warning(
            f"{again} of the {len(of['test'])} test texts are validation texts too: what is chosen by the one is chosen by the other."
        )


def read(file: Path, task: DataArguments) -> dict[str, list[str]]:
    """
    The columns `text`, `label`, and for pairs `pair`, of a file.

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
    columns = dict(zip(("text", "pair"), task.text_column_names, strict=False)) | {"label": task.label_column_name}
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
