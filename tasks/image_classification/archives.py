"""
Local copies of the data sets: the hub's parquet files, CIFAR's own python archive, MNIST's idx files, Tiny-ImageNet's folders.

Whatever is not what it should be is refused while it is read, by file and row: a label that is out of range, or an image of
another size, would train and score something else than the data set of that name.
"""

from __future__ import annotations

import io
import re
import reprlib
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tasks.command import sentence
from tasks.files import LARGEST, read_gzip, read_members, refuse_a_copy
from tasks.image_classification import folders
from tasks.image_classification.catalogue import DATASETS, Images
from tasks.image_classification.cifar_pickle import unpickle


Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) in uint8, labels (N,) in int64

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist

# members of the archive, prefix of the tar file, key of the labels
CIFAR = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "cifar-10", "labels"),
    "cifar100": (["train"], "test", "cifar-100", "fine_labels"),
}
MODES = {1: "L", 3: "RGB"}


def read(name: str, folder: Path, columns: tuple[str, str] | None = None) -> tuple[Arrays, Arrays]:
    """
    The training and the test images in a folder (or a CIFAR .tar.gz file).

    The folder holds one of: parquet files whose names (or folders) say `train` and `test` (Tiny-ImageNet: `valid`), as on the hub;
    for Tiny-ImageNet what its archive holds; for CIFAR the extracted python archive or its `cifar-10(0)-python.tar.gz`; for Fashion-MNIST the four `*-ubyte.gz` files.

    Args:
        name (`str`): one of `DATASETS`.
        folder (`Path`): or the archive.
        columns (`tuple[str, str]`, *optional*): the image's and the label's in parquet files, if not those of the hub.

    Raises:
        `ValueError`: there is nothing of the kind, or it is damaged, or it is not the data set of that name.
    """
    if not folder.exists():
        raise ValueError(f"`data_dir` is {folder}, which does not exist: give a folder with the files of {name}.")
    if folder.is_file() and not (name in CIFAR and folder.suffix in (".gz", ".tgz")):
        raise ValueError(f"`data_dir` is {folder}, a file: give the folder that holds the files of {name}.")
    images = DATASETS[name] if columns is None else replace(DATASETS[name], columns=columns)
    parquet = {
        split: [file for file in sorted(folder.rglob("*.parquet")) if _says(split, file, folder) and file.is_file()]
        for split in ("train", images.test_split)
    }
    if all(parquet.values()):
        both = set.intersection(*map(set, parquet.values()))
        if both:
            raise ValueError(f"{sorted(both)[0]} says both train and {images.test_split}: name it after one of them.")
        passed_over = set(folder.rglob("*.parquet")).difference(*parquet.values())
        if passed_over:
            raise ValueError(
                f"{sorted(passed_over)[0]} says neither train nor {images.test_split}, and would be passed over: move it out of "
                "`data_dir` (validation images are a share of those for training)."
            )
        for files in parquet.values():
            refuse_a_copy(files, "images")
            for file in files:
                _refuse_a_part(file)
        _refuse_other_names([file for files in parquet.values() for file in files], images)
        train, test = (_joined([_parquet(file, images) for file in files]) for files in parquet.values())
        return train, test
    if name == "tiny_imagenet":
        return folders.tiny_imagenet(folder)
    if name in CIFAR and (cifar := _cifar(name, folder)) is not None:
        return cifar
    if name == "fashion_mnist" and (folder / "train-images-idx3-ubyte.gz").is_file():
        return _idx_pair(folder, "train", images), _idx_pair(folder, "t10k", images)
    raise ValueError(
        f"`data_dir` is {folder}, where no files of {name} were found: expected train and test parquet files, "
        "CIFAR's python archive, or Fashion-MNIST's *-ubyte.gz files."
    )


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


def _joined(parts: list[Arrays]) -> Arrays:
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return x, y


# --- columns of pictures ---------------------------------------------------------------------------------------------


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


# --- idx files -------------------------------------------------------------------------------------------------------


def idx(path: Path) -> np.ndarray:
    """
    An array in MNIST's idx format, gzipped: two zero bytes, 8 = unsigned bytes, the number of dimensions, each dimension.

    Raises:
        `ValueError`: the file is not of this format, or cut off.
    """
    try:
        data = read_gzip(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole idx file: {error}") from error
    rank = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data, ">u4", rank, offset=4).tolist() if len(data) >= 4 + 4 * rank else []
    if not shape or data[:3] != b"\0\0\x08" or len(data) - 4 - 4 * rank != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is not a whole idx file of unsigned bytes. Fetch it again.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def _idx_pair(folder: Path, split: str, images: Images) -> Arrays:
    files = [folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: Fashion-MNIST has images and labels of train and of t10k.")
    x, y = map(idx, files)
    if x.shape[1:] != images.shape[:2] or not len(x):
        raise ValueError(
            f"{files[0]} holds an array of {x.shape}: expected images of {images.edge}×{images.edge} pixels."
        )
    if y.shape != (len(x),):
        raise ValueError(
            f"{files[1]} holds an array of {y.shape}, and {files[0]} {len(x)} images: the two do not belong together."
        )
    return x[..., None], checked_labels(y.tolist(), images, str(files[1]))


# --- CIFAR's python archive ------------------------------------------------------------------------------------------


def _cifar(name: str, folder: Path) -> tuple[Arrays, Arrays] | None:
    train, test, prefix, labels = CIFAR[name]
    archives = [folder] if folder.is_file() else sorted(folder.glob(f"{prefix}-python.tar.gz"))
    if archives:
        contents = {f"{archives[0]}: {name}": data for name, data in read_members(archives[0], [*train, test]).items()}
        order = [f"{archives[0]}: {batch}" for batch in [*train, test]]
    else:
        found = [
            next((file for file in sorted(folder.rglob(batch)) if file.is_file()), None) for batch in [*train, test]
        ]
        if not any(found):
            return None
        if None in found:
            missing = [*train, test][found.index(None)]
            raise ValueError(
                f"{missing} is missing in {folder}, which holds other parts of {name}: unpack the archive anew."
            )
        for file in found:
            if file.stat().st_size > LARGEST:
                raise ValueError(f"{file} is not a batch of CIFAR: it has more than {LARGEST >> 20} MiB.")
        contents = {str(file): file.read_bytes() for file in found}
        order = [*map(str, found)]
    batches = [_batch(contents[where], labels, DATASETS[name], where) for where in order]
    return _joined(batches[:-1]), batches[-1]


def _batch(data: bytes, labels: str, images: Images, where: str) -> Arrays:
    batch = unpickle(data, where)
    for key in ("data", labels):
        if key not in batch:
            raise ValueError(f"{where} is not a batch of CIFAR: it has no {key!r}, but {', '.join(map(repr, batch))}.")
    pixels, kept = batch["data"], batch[labels]
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3072 or not len(pixels):
        what = f"an array of {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(pixels).__name__}"
        raise ValueError(f"{where} is not a batch of CIFAR: its 'data' is {what}, not 3072 bytes an image.")
    if not isinstance(kept, list) or len(kept) != len(pixels):
        count = len(kept) if isinstance(kept, list) else "no list of"
        raise ValueError(f"{where} is not a batch of CIFAR: it has {len(pixels)} images and {count} labels.")
    x = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x), checked_labels(kept, images, where)
