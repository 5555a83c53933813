"""Local copies of the data sets: the hub's parquet files, CIFAR's own python archive, MNIST's idx files."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np


Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) in uint8, labels (N,)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist

# members of the archive, prefix of the tar file, key of the labels
CIFAR = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "cifar-10", b"labels"),
    "cifar100": (["train"], "test", "cifar-100", b"fine_labels"),
}


def read(name: str, folder: Path, columns: tuple[str, str]) -> tuple[Arrays, Arrays]:
    """
    The training and the test images in a folder (or a CIFAR .tar.gz file).

    The folder holds one of: parquet files with `train` and `test` in their names, as on the hub; for CIFAR the extracted
    python archive or its `cifar-10(0)-python.tar.gz`; for Fashion-MNIST the four `*-ubyte.gz` files.

    Raises:
        `ValueError`: there is nothing of the kind, or it is damaged, or it holds what data should not (see `unpickle`).
    """
    if not folder.exists():
        raise ValueError(f"`data_dir` is {folder}, which does not exist: give a folder with the files of {name}.")
    parquet = {split: sorted(map(str, folder.rglob(f"*{split}*.parquet"))) for split in ("train", "test")}
    if all(parquet.values()):
        return from_columns(datasets.load_dataset("parquet", data_files=parquet), columns)
    if name in CIFAR and (cifar := _cifar(name, folder)) is not None:
        return cifar
    if name == "fashion_mnist" and (folder / "train-images-idx3-ubyte.gz").is_file():
        return tuple(
            (idx(folder / f"{split}-images-idx3-ubyte.gz")[..., None], idx(folder / f"{split}-labels-idx1-ubyte.gz"))
            for split in ("train", "t10k")
        )
    raise ValueError(
        f"`data_dir` is {folder}, where no files of {name} were found: expected train and test parquet files, "
        "CIFAR's python archive, or Fashion-MNIST's *-ubyte.gz files."
    )


def from_columns(data: datasets.DatasetDict, columns: tuple[str, str]) -> tuple[Arrays, Arrays]:
    """
    The `train` and `test` split of a `datasets` data set with an image and a label column.

    Raises:
        `ValueError`: a split or a column is missing.
    """
    image, label = columns
    for split in ("train", "test"):
        if split not in data or not {image, label} <= set(data[split].column_names):
            raise ValueError(f"The data has no `{split}` split with columns `{image}` and `{label}`: {data}")

    def arrays(split: datasets.Dataset) -> Arrays:
        x = np.stack([np.asarray(picture) for picture in split[image]])
        return x if x.ndim == 4 else x[..., None], np.array(split[label])

    return arrays(data["train"].cast_column(image, datasets.Image())), arrays(
        data["test"].cast_column(image, datasets.Image())
    )


def idx(path: Path) -> np.ndarray:
    """
    An array in MNIST's idx format, gzipped: two zero bytes, 8 = unsigned bytes, the number of dimensions, each dimension.

    Raises:
        `ValueError`: the file is not of this format, or cut off.
    """
    try:
        with gzip.open(path) as file:
            zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            values = np.frombuffer(bytearray(file.read()), dtype=np.uint8)
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is not a whole idx file: {error}. Fetch it again.") from error
    if zeros != 0 or kind != 8 or values.size != np.prod(shape):
        raise ValueError(f"{path} is not a whole idx file of unsigned bytes. Fetch it again.")
    return values.reshape(shape)


def unpickle(data: bytes, source: str) -> dict[bytes, Any]:
    """
    A CIFAR batch: a pickled dictionary of arrays, lists and strings, from which nothing else is loaded or run.

    Raises:
        `ValueError`: it is damaged, or asks for anything that such a batch does not need.
    """
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{source} is not a batch of CIFAR: {error}. Nothing of it was run; do not use it."
        ) from error
    if not isinstance(batch, dict):
        raise ValueError(f"{source} is not a batch of CIFAR, but a {type(batch).__name__}.")
    return batch


class _BatchUnpickler(pickle.Unpickler):
    """Knows the three names that a pickled NumPy array needs, under the old and the new name of NumPy's module."""

    ALLOWED = {
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how newer Pythons write bytes for older ones
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar(name: str, folder: Path) -> tuple[Arrays, Arrays] | None:
    train, test, prefix, labels = CIFAR[name]
    archives = [folder] if folder.is_file() else sorted(folder.glob(f"{prefix}-python.tar.gz"))
    if archives:
        with tarfile.open(archives[0]) as archive:
            # Read, never extracted: a member's path cannot lead anywhere.
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            if not {*train, test} <= members.keys():
                raise ValueError(f"{archives[0]} lacks {', '.join(sorted({*train, test} - members.keys()))}.")
            contents = {batch: archive.extractfile(members[batch]).read() for batch in [*train, test]}
    else:
        found = {batch: next(iter(sorted(folder.rglob(batch))), None) for batch in [*train, test]}
        if None in found.values():
            return None
        contents = {batch: path.read_bytes() for batch, path in found.items()}

    def arrays(batches: list[str]) -> Arrays:
        loaded = [unpickle(contents[batch], f"{folder}: {batch}") for batch in batches]
        for batch in loaded:
            if b"data" not in batch or labels not in batch or batch[b"data"].shape != (len(batch[labels]), 3072):
                raise ValueError(
                    f"{folder} is not CIFAR's python archive: a batch lacks {labels} or 3072 bytes an image."
                )
        x = np.concatenate([batch[b"data"] for batch in loaded]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(x), np.concatenate([np.array(batch[labels]) for batch in loaded])

    return arrays(train), arrays([test])
