"""
Local copies of the data sets: the hub's parquet files, CIFAR's own python archive, MNIST's idx files, Tiny-ImageNet's folders.

Whatever is not what it should be is refused while it is read, by file and row: a label that is out of range, or an image of
another size, would train and score something else than the data set of that name.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.files import LARGEST, read_gzip, read_members
from tasks.image_classification import folders, hub_files
from tasks.image_classification.catalogue import DATASETS, Images
from tasks.image_classification.cifar_pickle import unpickle
from tasks.image_classification.hub_files import Arrays, checked_labels, joined


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist

# members of the archive, prefix of the tar file, key of the labels
CIFAR = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "cifar-10", "labels"),
    "cifar100": (["train"], "test", "cifar-100", "fine_labels"),
}


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
        `ValueError`: there is nothing of the kind, or it is damaged, or it is not the data set of that name, or there are several of which
            one would be taken.
    """
    if not folder.exists():
        raise ValueError(f"`data_dir` is {folder}, which does not exist: give a folder with the files of {name}.")
    if folder.is_file() and not (name in CIFAR and folder.suffix in (".gz", ".tgz")):
        raise ValueError(f"`data_dir` is {folder}, a file: give the folder that holds the files of {name}.")
    images = DATASETS[name] if columns is None else replace(DATASETS[name], columns=columns)
    if (found := hub_files.read(folder, images)) is not None:
        if others := [file for form in _other_forms(name) for file in sorted(folder.rglob(form)) if file.is_file()]:
            raise ValueError(
                f"{folder} holds parquet files, and {others[0]} of {name} as well: move one of the two out of `data_dir`."
            )
        return found
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


def _other_forms(name: str) -> list[str]:
    if name not in CIFAR:
        return ["wnids.txt" if name == "tiny_imagenet" else "*-idx?-ubyte.gz"]
    train, test, prefix, _ = CIFAR[name]
    return [*train, test, f"{prefix}-python.tar.gz"]


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
    unpacked = _unpacked(name, folder)
    if archives:
        members = read_members(archives[0], [*train, test])
        for batch, file in unpacked.items():
            if file.stat().st_size != len(members[batch]) or file.read_bytes() != members[batch]:
                raise ValueError(
                    f"{file} is not the one in {archives[0]}, which would be read: move one of the two out of `data_dir`."
                )
        contents = {f"{archives[0]}: {batch}": members[batch] for batch in [*train, test]}
    else:
        if not unpacked:
            return None
        missing = [batch for batch in [*train, test] if batch not in unpacked]
        if missing:
            raise ValueError(
                f"{missing[0]} is missing in {folder}, which holds other parts of {name}: unpack the archive anew."
            )
        contents = {}
        for file in (unpacked[batch] for batch in [*train, test]):
            if file.stat().st_size > LARGEST:
                raise ValueError(f"{file} is not a batch of CIFAR: it has more than {LARGEST >> 20} MiB.")
            contents[str(file)] = file.read_bytes()
    batches = [_batch(data, labels, DATASETS[name], where) for where, data in contents.items()]
    *parts, test_part = batches
    usual = Counter(len(y) for _, y in parts).most_common(1)[0][0]
    for where, (_, y) in zip(contents, parts, strict=False):
        if len(y) != usual:
            raise ValueError(f"{where} has {len(y)} images, and the other batches {usual}: fetch it again.")
    return joined(parts), test_part


def _unpacked(name: str, folder: Path) -> dict[str, Path]:
    """
    The batches that lie in a folder, by their names.

    Raises:
        `ValueError`: one is there twice, or one more than the data set has.
    """
    train, test, _, _ = CIFAR[name]
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        known = file.name in (*train, test)
        further = name == "cifar10" and re.fullmatch(r"data_batch_\d+", file.name)  # CIFAR-100 may lie beside CIFAR-10
        if not (known or further) or not file.is_file():
            continue
        if not known:
            raise ValueError(f"{file} is no part of {name}, and would be passed over: move it out of `data_dir`.")
        if file.name in found:
            raise ValueError(
                f"{folder} holds {found[file.name]} and {file}, of which one would be read: move the other out of it."
            )
        found[file.name] = file
    return found


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
