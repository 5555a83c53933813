"""Where running text in two languages comes from: the handbook, Debian's dictionary, parallel files, `datasets`."""

from __future__ import annotations

import csv
import json
import lzma
import re
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder
from transformers.utils import logging

from tasks.command import cut, sentence
from tasks.files import refuse_a_copy
from tasks.tables import is_header, object_of, refuse_misread, refuse_swallowed_rows
from tasks.translation import folders


logger = logging.get_logger(__name__)
Pairs = list[tuple[str, str]]  # (source, target), one sentence or paragraph each

HANDBOOK = Path(__file__).parent / "handbook" / "handbook.de-en.tsv.xz"
DING = Path("/usr/share/trans/de-en")
# Grammar, fields of knowledge, explanations, spelling variants: {f} [med.] (on a menu) <eelpout>
DING_REMARK = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|<[^>]*>")
SPLIT_EVERY, SPLIT_LIMIT = 20, 500
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def split(pairs: Pairs) -> dict[str, Pairs]:
    """
    Every 20th pair for validation and every 20th for the test, at most 500 each; the rest is for training.

    By position, not by chance: every run and every seed sees the same sets.
    """
    held_out = {
        "validation": range(0, len(pairs), SPLIT_EVERY)[:SPLIT_LIMIT],
        "test": range(SPLIT_EVERY // 2, len(pairs), SPLIT_EVERY)[:SPLIT_LIMIT],
    }
    splits = {name: [pairs[i] for i in numbers] for name, numbers in held_out.items()}
    taken = {i for numbers in held_out.values() for i in numbers}
    return {"train": [pair for i, pair in enumerate(pairs) if i not in taken], **splits}


def handbook(source: str, target: str) -> dict[str, Pairs]:
    """
    The sentences that ship with this task, in either direction.

    Raises:
        `ValueError`: another language pair.
    """
    if {source, target} != {"de", "en"}:
        raise ValueError(
            f"`dataset` handbook is German and English, not {source} and {target}: give a data set of yours."
        )
    lines = lzma.decompress(HANDBOOK.read_bytes()).decode().splitlines()
    pairs = [tuple(line.split("\t")) for line in lines]
    return split(pairs if source == "de" else [(target, source) for source, target in pairs])


def ding(source: str, target: str) -> dict[str, Pairs]:
    """
    Phrases of three or more words from Debian's dictionary trans-de-en, in either direction.

    A line holds entries and their derivations (`|`), each with alternatives (`;`), of which the first ones are taken.

    Raises:
        `ValueError`: the package is not installed, or another language pair.
    """
    if {source, target} != {"de", "en"}:
        raise ValueError(f"`dataset` ding is German and English, not {source} and {target}: give a data set of yours.")
    if not DING.is_file():
        raise ValueError(f"`dataset` ding needs {DING}: run apt-get install trans-de-en, or take the handbook.")
    pairs = {}
    for line in DING.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        german, _, english = DING_REMARK.sub(" ", line).partition(" :: ")
        for entry in zip(german.split("|"), english.split("|"), strict=False):
            phrase, translation = (" ".join(side.split(";")[0].split()) for side in entry)
            if min(phrase.count(" "), translation.count(" ")) >= 2:
                pairs.setdefault(phrase, translation)
    return split(list(pairs.items()) if source == "de" else [(english, german) for german, english in pairs.items()])


def read_lines(file: Path) -> list[str]:
    """
    Lines of a UTF-8 text file; only the line feed ends a line, as for Moses and fairseq. A byte-order mark is no part of it.

    Raises:
        `ValueError`: no such file, or not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: a folder of text has train, valid and test in both languages.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): convert it, for instance with iconv.") from error
    return text.removesuffix("\n").split("\n") if text else []


def parallel(folder: Path, name: str, source: str, target: str) -> Pairs:
    """
    Line i of `name.de` and line i of `name.en` as pairs.

    Raises:
        `ValueError`: a file is missing, or the two differ in length.
    """
    sides = [read_lines(folder / f"{name}.{language}") for language in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{folder / name}.{source} has {len(sides[0])} lines and .{target} has {len(sides[1])}: they are not parallel."
        )
    return list(zip(*sides, strict=True))


def parallel_folder(folder: Path, source: str, target: str) -> dict[str, Pairs]:
    """
    `train`, `valid` and `test` text files of a folder; if there is only `train`, it is split.

    Raises:
        `ValueError`: a file is missing, or another lies beside `train` alone; or see [`parallel`].
    """
    held_out = [folder / f"{name}.{language}" for name in ("valid", "test") for language in (source, target)]
    if not any(file.is_file() for file in held_out):
        folders.refuse_other_text(folder, source, target)
        return split(parallel(folder, "train", source, target))
    names = {"train": "train", "validation": "valid", "test": "test"}
    return {split: parallel(folder, name, source, target) for split, name in names.items()}


def column_pairs(rows: Dataset, source: str, target: str, held_out: bool = False) -> Pairs:
    """
    Pairs of a data set with a `translation` column of `{"de": ..., "en": ...}`, or with columns `de` and `en`.

    Training pairs without text in one language (an empty cell of a csv file, for instance) are left out with a warning.

    Raises:
        `ValueError`: neither is there, a cell cannot be read or is no text, a language is missing everywhere, or in a held-out row;
            the rows have more fields than the header, a column is there twice, or the header inside of the rows.
    """
    refuse_misread(rows.column_names, {source, target, "translation"}, "`dataset`")
    if {source, target} <= set(rows.column_names):
        pairs = list(zip(rows[source], rows[target], strict=True))
    elif "translation" in rows.column_names:
        cells = [translation(number, cell) for number, cell in enumerate(rows["translation"])]
        pairs = [(cell.get(source), cell.get(target)) for cell in cells]
    else:
        raise ValueError(
            f"`dataset` has the columns {cut(repr(rows.column_names))}: expected `translation`, or `{source}` and `{target}`; "
            "are `source_language` and `target_language` right?"
        )
    for number, pair in enumerate(pairs):
        if is_header(dict(zip((source, target), pair, strict=True)), (source, target)):
            raise ValueError(
                f"`dataset` row {number} is its header again: join files without the headers of all but the first."
            )
        for language, text in zip((source, target), pair, strict=True):
            if not isinstance(text, str | None):
                raise ValueError(f"`dataset` row {number} has {cut(repr(text))} in {language}: expected text.")
    for language, side in zip((source, target), zip(*pairs, strict=True), strict=False):
        if all(text is None for text in side):
            raise ValueError(
                f"`dataset` has no text in {language}; are `source_language` ({source}) and `target_language` ({target}) "
                "right?"
            )
    empty = [number for number, pair in enumerate(pairs) if None in pair]
    if empty and held_out:
        raise ValueError(
            f"`dataset` row {empty[0]} of a split for validation or test has no text in one language: fill it in, or take "
            "it out (csv reads an empty cell, N/A and null as no text)."
        )
    if empty:
        logger.warning(f"{len(empty)} of {len(pairs)} training pairs have no text in one language and are left out.")
    return [pair for pair in pairs if None not in pair]


def translation(number: int, cell: dict | str | None) -> dict:
    """
    One cell of a `translation` column; a csv file can hold it as JSON text only, and an empty one has no languages.

    Raises:
        `ValueError`: text that is no JSON object.
    """
    if cell is None:
        return {}
    if isinstance(cell, dict):
        return cell
    try:
        parsed = json.loads(cell)
    except (TypeError, ValueError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(
            f'`dataset` row {number} has the `translation` {cut(repr(cell))}: expected JSON like {{"de": "ja", "en": "yes"}}, or '
            "one column for each language."
        )
    return parsed


def from_datasets(name: str, config: str | None, source: str, target: str) -> dict[str, Pairs]:
    """
    A json, csv or parquet file, a folder of them or a data set of the hub; if it has only one split, that is split.

    Raises:
        `ValueError`: `datasets` cannot load it, two of the three splits are there, a file beside its copy, or one that is not read.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    _refuse_double_keys([file for file in files if file.suffix == ".json"])
    _refuse_swallowed_rows([file for file in files if file.suffix == ".csv"])
    try:
        if path.is_file():
            if config is not None:
                raise ValueError(f"`dataset_config` is {config!r}, and a file has none: leave it out")
            loaded = load_dataset(FORMATS[path.suffix], data_files=name)
        else:
            loaded = load_dataset(name, config)
    except KeyError:
        raise ValueError(f"`dataset` is {name}: give a file that ends in {', '.join(FORMATS)}, or a folder.") from None
    except Exception as error:
        if path.exists():
            raise ValueError(f"`dataset` {name} could not be read: {sentence(error.__cause__ or error)}") from error
        raise ValueError(
            f"`dataset` is {name!r}, which is neither handbook nor ding nor a folder that this task knows, and `datasets` "
            f"could not load it: {sentence(error.__cause__ or error)}"
        ) from error
    assert isinstance(loaded, DatasetDict)
    if path.is_dir():
        read = load_dataset_builder(name, config).config.data_files
        for files in read.values():
            refuse_a_copy(filter(Path.is_file, map(Path, files)), "pairs")  # others are parts of archives
        folders.refuse_other_data(path, read)
    splits = {
        name: column_pairs(rows, source, target, held_out=name != "train" and len(loaded) > 1)
        for name, rows in loaded.items()
    }
    if len(splits) == 1:
        return split(*splits.values())
    missing = {"train", "validation", "test"} - splits.keys()
    if missing:
        raise ValueError(f"`dataset` {name} has the splits {sorted(splits)}: {' and '.join(sorted(missing))} missing.")
    return {split: splits[split] for split in ("train", "validation", "test")}


def _refuse_swallowed_rows(files: list[Path]) -> None:
    """
    Refuses csv files with a quotation mark that is not closed.

    Raises:
        `ValueError`: so it is; it names the file.
    """
    for file in files:
        csv.field_size_limit(file.stat().st_size + 1)
        with file.open(encoding="utf-8-sig", newline="", errors="replace") as lines:
            try:
                refuse_swallowed_rows(csv.DictReader(lines))
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{file} cannot be read: {sentence(error)}") from error


def _refuse_double_keys(files: list[Path]) -> None:
    """
    Refuses lists of objects in which a key is there twice: `datasets` takes the last. Of objects one a line it refuses them itself.

    Raises:
        `ValueError`: so it is; it names the file.
    """
    for file in files:
        if file.read_bytes().lstrip().startswith(b"["):
            try:
                json.loads(file.read_bytes(), object_pairs_hook=object_of, strict=False)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} cannot be read: {sentence(error)}") from error
