"""Texts and their labels: which files, and how they are split and cut into tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from tasks.command import cut, sentence
from tasks.identity import fingerprint
from tasks.tables import warn_of_lost_characters
from tasks.text_classification.labels import refuse_alike, refuse_values
from tasks.text_classification.text_files import ENDINGS, read


logger = logging.get_logger(__name__)
SPLITS = ("train", "validation", "test")


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
    splits = {
        name: Dataset.from_dict(read(Path(file), task.text_column_names, task.label_column_name))
        for name, file in files.items()
        if file is not None
    }
    found = set(splits["train"]["label"])
    refuse_alike(found, task.train_file)
    refuse_values(found, task.train_file)
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
        if (row := next((i for i, label in enumerate(split["label"], 1) if label not in found), None)) is not None:
            label = split["label"][row - 1]
            raise ValueError(
                f"`{name}_file` {files[name]}, row {row}: its label is {cut(repr(label))}, which no training text has."
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
