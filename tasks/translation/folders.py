"""What the folder of a data set has to hold, and what must not lie beside it, for it would not be read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
DESCRIPTIONS = re.compile(r"checksums|dataset_\w+|state|config")  # names of .json files that hold no pairs


def refuse_incomplete(folder: Path, source: str, target: str) -> None:
    """
    Names what a folder lacks that is neither raw text in this source language nor for `datasets`.

    Raises:
        `ValueError`: it looks prepared, and its text must not be tokenised and cut again, but has no source dictionary; or
            it has a training text, but not in the source language.
    """
    signs = [f"dict.{target}.txt"]
    if (folder / f"train.{source}").is_file():  # and not a folder of json files, where these mean nothing
        signs += ["code", "checksums.json", "tmp"]
    prepared = [name for name in signs if (folder / name).exists()]
    if prepared:
        raise ValueError(
            f"`dataset` {folder} holds {', '.join(prepared)}, as a prepared folder does, but dict.{source}.txt is missing: "
            f"prepare it again (or move raw text into a folder of its own); is `source_language` {source} right?"
        )
    texts = sorted(
        file.name for pattern in ("train.??", "train.*.idx", f"train.{target}") for file in folder.glob(pattern)
    )
    if texts and not (folder / f"train.{source}").is_file():
        raise ValueError(
            f"`dataset` {folder} holds {', '.join(dict.fromkeys(texts))}, but train.{source} is missing, or no file; is "
            f"`source_language` {source} right?"
        )


def refuse_other_text(folder: Path, source: str, target: str) -> None:
    """
    Refuses other text in one of the two languages beside `train` alone, such as `val.de` and `test2016.de`: it would not be read, and
    parts of `train` would be held out in its place.

    Raises:
        `ValueError`: there is such; it names the files.
    """
    endings = tuple(f".{language}{packed}" for language in (source, target) for packed in ("", ".gz", ".bz2", ".xz"))
    others = {file.name for file in folder.iterdir() if file.name.endswith(endings) and file.is_file()}
    others -= {f"train.{source}", f"train.{target}"}
    _refuse(folder, [name for name in others if not name.startswith(".")], "valid.* and test.*")


def refuse_other_data(folder: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """
    Refuses tables in a folder for `datasets` that are in no split, for their names say none, and others' do. Where its README.md says
    which files are read, all others may be there. Warns where no name says one.

    Args:
        folder (`Path`): the data set's.
        splits (`Mapping[str, Sequence[str]]`): the files that are read.

    Raises:
        `ValueError`: there are such; it names the files.
    """
    readme = folder / "README.md"
    if readme.is_file() and b"data_files" in readme.read_bytes():
        return
    read = [Path(file) for files in splits.values() for file in files]
    known, kinds = {file.resolve() for file in read}, {_kind(file) for file in read}
    others = []
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in name.parts) or name.parts[0] == "tmp"
        described = _kind(file) == ".json" and (".json" not in kinds or DESCRIPTIONS.fullmatch(file.stem))
        if _kind(file) in TABLES and not hidden and not described and file.is_file() and file.resolve() not in known:
            others.append(str(name))
    _refuse(folder, others, "validation.* and test.*, parts of the training text train-2.* and so on")
    words = {re.sub(r"[\W\d_]+", "", file.name) for file in read}
    if len(words) > 1 and "train" not in str(words) and len(splits) == 1:
        names = ", ".join(sorted(file.name for file in read)[:3])
        logger.warning(
            f"No file of {folder} ({names} ...) says which split it is: all are taken as one, of which parts are held out."
        )


def refuse_other_shards(folder: Path, prefix: Path) -> None:
    """
    Refuses further parts of binary training text, `train1.de-en` and so on, which fairseq reads and this task does not, and warns of the
    other direction's, which neither reads.

    Raises:
        `ValueError`: there are such; it names them.
    """
    pair = prefix.name.removeprefix("train.")
    found = sorted({file.name.rpartition(".")[0] for file in folder.glob("train*.idx")})
    if parts := [name for name in found if re.fullmatch(rf"train\d+\.{re.escape(pair)}\..*", name)]:
        raise ValueError(
            f"`dataset` {folder} holds {', '.join(parts)}, which would not be read: make one train.{pair} of all parts."
        )
    back = f"train.{'-'.join(reversed(pair.split('-')))}."
    if others := [name for name in found if name.startswith(back)]:
        logger.warning(f"{folder} holds {', '.join(others)} beside train.{pair}, and they are not read.")


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _refuse(folder: Path, others: Collection[str], names: str) -> None:
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"`dataset` {folder} holds {', '.join(sorted(others)[:3])}{more}, which would not be read: call held-out sets {names}, or "
            "move what is none of this data set out of the folder."
        )
