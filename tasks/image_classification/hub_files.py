"""
Images as they lie on the Hugging Face hub: parquet files with a column of pictures and one of labels, there or in a folder.

Whatever is not what it should be is refused by file and row, as in [`~tasks.image_classification.archives`].
"""

from __future__ import annotations

import io
import re
import reprlib
import tempfile
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tasks.command import sentence
from tasks.files import refuse_a_copy
from tasks.image_classification.catalogue import DATASETS, Images


Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) in uint8, labels (N,) in int64

# A capital, or what a download that broke off adds. Checksums may be there.
ODD = re.compile(r"\.(?!parquet$)(?i:parquet)(?!\.(md5|sha\d+|crc|sig|asc)$)")
MODES = {1: "L", 3: "RGB"}


def read(folder: Path, images: Images) -> tuple[Arrays, Arrays] | None:
    """
    The training and the test images of the parquet files in a folder whose names, or folders, say so; `None` where one is not there.

    Raises:
        `ValueError`: a file is damaged, there twice, says both or neither, is one of several that are not all there, or numbers the
            classes differently; a row is not what it should be.
    """
    parquet = {
        split: [file for file in sorted(folder.rglob("*.parquet")) if _says(split, file, folder) and file.is_file()]
        for split in ("train", images.test_split)
    }
    if not all(parquet.values()):
        return None
    both = set.intersection(*map(set, parquet.values()))
    if both:
        raise ValueError(f"{sorted(both)[0]} says both train and {images.test_split}: name it after one of them.")
    passed_over = set(folder.rglob("*.parquet")).difference(*parquet.values())
    if passed_over:
        raise ValueError(
            f"{sorted(passed_over)[0]} says neither train nor {images.test_split}, and would be passed over: move it out of "
            "`data_dir` (validation images are a share of those for training)."
        )
    for file in sorted(folder.rglob("*")):
        visible = not any(part.startswith(".") for part in file.relative_to(folder).parts)
        if visible and ODD.search(file.name) and file.is_file():
            raise ValueError(
                f"{file} does not end on .parquet, and would be passed over: rename it, fetch it anew, or move it out."
            )
    for files in parquet.values():
        refuse_a_copy(files, "images")
        for file in files:
            _refuse_a_part(file)
    _refuse_other_names([file for files in parquet.values() for file in files], images)
    train, test = (joined([_parquet(file, images) for file in files]) for files in parquet.values())
    return train, test


def _refuse_a_part(file: Path) -> None:
    """
    A hub's file is called `train-00000-of-00003`, and the other two belong to it.

    Raises:
        `ValueError`: one of them is missing.
    """
    found = re.search(r"-(\d{5})-of-(\d{5})", file.name)
    for number in range(int(found[2]) if found else 0):
        other = file.name.replace(found[0], f"-{number:05d}-of-{found[2]}")
        if not file.with_name(other).is_file():
            raise ValueError(f"{file} is one of {int(found[2])} files, and {other} is missing beside it: fetch all.")


def _refuse_other_names(files: Iterable[Path], images: Images) -> None:
    """
    Where files say which class each number is, all of them have to say the same.

    Raises:
        `ValueError`: two do not; it names both, and the first class that differs.
    """
    first: tuple[Path, list[str]] | None = None
    for file in files:
        try:
            label = datasets.Features.from_arrow_schema(pq.read_schema(file)).get(images.columns[1])
        except Exception:  # of a file that is none: `_parquet` says so
            continue
        if not isinstance(label, datasets.ClassLabel):
            continue
        first = first or (file, label.names)
        for number, (ours, theirs) in enumerate(zip_longest(label.names, first[1])):
            if ours != theirs:
                raise ValueError(
                    f"Class {number} is {ours} in {file}, and {theirs} in {first[0]}: take files that number the classes alike."
                )


def _says(split: str, file: Path, folder: Path) -> bool:
    """Whether a file's name or one of its folders has the word: `train-latest` is no test split."""
    return re.search(rf"(?<![a-z]){split}(?![a-z])", str(file.relative_to(folder)), re.IGNORECASE) is not None


def joined(parts: list[Arrays]) -> Arrays:
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return x, y


def _parquet(file: Path, images: Images) -> Arrays:
    try:
        # As a stream, which copies nothing into a cache, but wants a folder for one.
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset(
                "parquet", data_files=str(file), split="train", streaming=True, cache_dir=cache, batch_size=1000
            )
            names = rows.column_names or list(next(iter(rows), {}))
            if not set(images.columns) <= set(names):
                raise ValueError(f"it has the columns {', '.join(names)}, not {' and '.join(images.columns)}")
            rows = rows.select_columns(list(images.columns)).cast_column(
                images.columns[0], datasets.Image(decode=False)
            )
            return pictures(rows, images, str(file))
    except Exception as error:  # pyarrow's and datasets' many
        if str(error).startswith(str(file)):  # by row
            raise
        raise ValueError(f"{file} is no parquet file of images: {sentence(error)}.") from error


def from_hub(name: str) -> tuple[Arrays, Arrays]:
    """
    The training and the test images of a data set on the Hugging Face hub.

    Raises:
        `ValueError`: it cannot be loaded, a split or a column is missing, or a row is not what it should be.
    """
    images = DATASETS[name]
    try:
        data = datasets.load_dataset(images.hub)
    except Exception as error:  # of the network, the hub's client and `datasets`
        raise ValueError(
            f"`dataset` {name} could not be loaded from the hub ({sentence(error)}): give a local copy as `data_dir`."
        ) from error

    def split(part: str) -> Arrays:
        if part not in data or not set(images.columns) <= set(data[part].column_names):
            raise ValueError(f"{images.hub} has no {part} split with columns {' and '.join(images.columns)}: {data}")
        rows = (
            data[part]
            .select_columns(list(images.columns))
            .cast_column(images.columns[0], datasets.Image(decode=False))
        )
        return pictures(rows, images, f"{images.hub}, {part}")

    return split("train"), split(images.test_split)


def pictures(rows: Iterable[dict], images: Images, where: str) -> Arrays:
    """
    Encoded pictures and labels as arrays.

    Args:
        rows (`Iterable[dict]`): with an image column of `{"bytes": ...}` and a label column.
        images ([`Images`]): what they should be.
        where (`str`): names the file in messages.

    Raises:
        `ValueError`: a row is no picture of the right size and colours, or its label no class of the data set.
    """
    image, label = images.columns
    x, y = [], []
    for number, row in enumerate(rows):
        x.append(_picture(row[image], images, f"{where}, row {number}"))
        y.append(row[label])
    if not x:
        raise ValueError(f"{where} holds no images.")
    return np.stack(x), checked_labels(y, images, where)


def _picture(cell: Any, images: Images, where: str) -> np.ndarray:
    try:
        if cell["bytes"] is None:  # a file of others must not choose what is read here
            raise ValueError(f"it holds no picture, but the path {cell['path']}")
        with Image.open(io.BytesIO(cell["bytes"])) as picture:
            # Before it is unpacked: a small file can hold a huge picture.
            found, expected = (picture.size, picture.mode), ((images.edge, images.edge), MODES[images.channels])
            if found != expected:
                (width, height), mode = found
                raise ValueError(
                    f"{width}×{height} pixels in mode {mode}, not {images.edge}×{images.edge} in {expected[1]}"
                )
            return np.asarray(picture).reshape(images.shape)
    except Exception as error:  # of Pillow's decoders
        raise ValueError(f"{where} is not an image of the data set: {sentence(error)}.") from error


def checked_labels(labels: Iterable[Any], images: Images, where: str) -> np.ndarray:
    """
    Labels as an array, (N,).

    Raises:
        `ValueError`: one is not a whole number from 0 to below the number of classes.
    """
    kept = []
    for number, label in enumerate(labels):
        whole = isinstance(label, int) and not isinstance(label, bool)
        if not (whole and 0 <= label < images.classes):
            raise ValueError(
                f"{where}, row {number} has the label {reprlib.repr(label)}: expected a whole number from 0 to {images.classes - 1}."
            )
        kept.append(int(label))
    return np.array(kept, dtype=np.int64)
