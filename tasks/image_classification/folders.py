"""Tiny-ImageNet and ImageNet as they are unpacked: folders of JPEG files, and nothing missing in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from tasks.command import cut, sentence
from tasks.files import refuse_a_copy
from tasks.image_classification.catalogue import DATASETS


Files = tuple[list[Path], np.ndarray]  # pictures, labels (N,) in int64

AGAIN = "unpack the archive anew"

# What may lie beside pictures: texts (boxes, a README), checksums, and what Windows leaves.
KNOWN = re.compile(
    r"(?i)(\.(txt|md|csv|json|xml|md5|sha\d+|crc|sig|asc)|^(readme|license|(md5|sha\d+)sums?|thumbs\.db|desktop\.ini))$"
)
# What a browser or a file manager adds to the name of a copy.
COPY = re.compile(r"(?i)( ?\(\d+\)| - copy( \(\d+\))?| copy( \d+)?)$")


def tiny_imagenet(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """
    The training and the validation images, which are the test images here, of `tiny-imagenet-200`: of its own layout, in which
    `val_annotations.txt` tells the classes of the validation images, or with a folder for each of their classes.

    Args:
        folder (`Path`): that folder, or the one that it is in.

    Returns:
        Twice images (N, 64, 64, 3) in bytes and labels (N,), classes numbered in the order of their names.

    Raises:
        `ValueError`: it is no such folder, or something is missing; the sentence names it.
    """
    root = folder / "tiny-imagenet-200" if (folder / "tiny-imagenet-200").is_dir() else folder
    listed = root / "wnids.txt"
    if not listed.is_file():
        raise ValueError(
            f"`data_dir` is {folder}, which has no wnids.txt: give the folder tiny-imagenet-200, as it is unpacked."
        )
    classes = sorted(set(listed.read_text(encoding="utf-8").split()))
    if len(classes) != DATASETS["tiny_imagenet"].classes:
        raise ValueError(f"{listed} names {len(classes)} classes, not 200: {AGAIN}.")
    train = _by_class(root / "train", classes)
    for name in classes:
        _refuse_missing(root / "train" / name / f"{name}_boxes.txt", root / "train" / name / "images")
    annotated = root / "val" / "val_annotations.txt"
    test = _annotated(annotated, classes) if annotated.is_file() else _by_class(root / "val", classes)
    return _read(*train), _read(*test)


def imagenet(folder: Path) -> tuple[Files, Files]:
    """
    The training and the validation files of ImageNet-1k, in folders `train` and `val` with a folder for each class.

    Raises:
        `ValueError`: a folder is missing, or has no pictures or another number of classes, or one is a copy of the other; the sentence
            names it.
    """
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise ValueError(
                f"`data_dir` is {folder}, which has no folder {part}: give the one with ImageNet's train and val."
            )
    classes = sorted(found.name for found in (folder / "train").iterdir() if found.is_dir())
    if len(classes) != DATASETS["imagenet"].classes:
        raise ValueError(
            f"{folder / 'train'} has folders of {len(classes)} classes, not 1000: unpack all of its archives."
        )
    if not any(found.is_dir() for found in (folder / "val").iterdir()):
        raise ValueError(
            f"{folder / 'val'} has no folder for each class: sort its pictures into folders named as those of train."
        )
    train, val = (_by_class(folder / part, classes) for part in ("train", "val"))
    # ImageNet has no file name twice.
    known = {(file.parent.name, file.name) for file in train[0]}
    again = [file for file in val[0] if (file.parent.name, file.name) in known]
    if len(again) > len(val[0]) / 10:
        raise ValueError(
            f"{folder}: {len(again)} of the {len(val[0])} files of val are in train too ({again[0].parent.name}/{again[0].name}), and scores of "
            f"them mean nothing: {AGAIN}."
        )
    return train, val


def _by_class(folder: Path, classes: Sequence[str]) -> Files:
    files, labels = [], []
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if place.name not in classes and (other := next(_pictures(place), None)):
            raise ValueError(
                f"{other} is in no folder of a class, and would be left out: sort all pictures, or {AGAIN}."
            )
    for label, name in enumerate(classes):
        found = _pictures_of_class(folder / name)
        if not found:
            without = [name for name in classes if not (folder / name).is_dir()]
            known = f", and {len(without)} of {len(classes)} classes have no folder" if without else ""
            raise ValueError(f"{folder / name} has no pictures{known}: {AGAIN}.")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _pictures_of_class(folder: Path) -> list[Path]:
    """
    Its pictures, in order.

    Raises:
        `ValueError`: a file beside them would be passed over, or is a copy of one.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue  # macOS writes ._NAME.JPEG beside NAME.JPEG
        if file.suffix.lower() in IMG_EXTENSIONS:
            found.setdefault(COPY.sub("", file.stem), []).append(file)
        elif not KNOWN.search(file.name) and file.is_file():
            raise ValueError(
                f"{file} does not end on .JPEG or the like, and would be passed over: rename it, fetch it anew, or move it out."
            )
    for files in found.values():
        refuse_a_copy(files, "pictures")
    return sorted(file for files in found.values() for file in files)


def _pictures(place: Path) -> Iterator[Path]:
    files = (file for file in (place, *place.rglob("*")) if file.suffix.lower() in IMG_EXTENSIONS)
    return (file for file in files if not file.name.startswith("."))


def _refuse_missing(listed: Path, folder: Path) -> None:
    """Refuses a class of which a file is missing that its list of boxes names."""
    if not listed.is_file():
        return
    names = [line.split("\t")[0] for line in listed.read_text(encoding="utf-8").splitlines() if line]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]}, and {len(missing)} of the {len(names)} files of {listed.name}: {AGAIN}."
        )


def _annotated(listed: Path, classes: Sequence[str]) -> Files:
    files, labels = [], []
    known: set[Path] = set()
    number = {name: label for label, name in enumerate(classes)}
    for row, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, rest = line.partition("\t")
        kind = rest.split("\t")[0]
        if kind not in number:
            raise ValueError(
                f"{listed}, line {row} has the class {cut(repr(kind))}, which wnids.txt has not: {AGAIN}."
            )
        file = listed.parent / "images" / name
        if file in known:
            raise ValueError(
                f"{listed}, line {row} lists {cut(name)} a second time, and it would count twice: {AGAIN}."
            )
        known.add(file)
        files.append(file)
        labels.append(number[kind])
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        what = (
            f"lacks {missing[0].name}, and {len(missing)} of the {len(files)} files of"
            if missing
            else "has no line in"
        )
        raise ValueError(f"{listed.parent / 'images'} {what} {listed.name}: {AGAIN}.")
    if others := sorted(set(_pictures_of_class(listed.parent / "images")).difference(files)):
        raise ValueError(
            f"{listed} has no line for {others[0]}, and {len(others)} pictures would be left out: {AGAIN}."
        )
    return files, np.array(labels, dtype=np.int64)


def _read(files: Sequence[Path], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.empty((len(files), *DATASETS["tiny_imagenet"].shape), dtype=np.uint8)

    def read(row: int) -> None:
        pixels[row] = _picture(files[row])

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(files))):
            pass
    return pixels, labels


def _picture(file: Path) -> np.ndarray:
    edge = DATASETS["tiny_imagenet"].edge
    try:
        with Image.open(file) as picture:
            if picture.size != (edge, edge):
                raise ValueError(f"{picture.width}×{picture.height} pixels, not {edge}×{edge}")
            return np.asarray(picture.convert("RGB"))  # some are grey
    except Exception as error:  # of Pillow's decoders
        raise ValueError(f"{file} is not a picture of Tiny-ImageNet: {sentence(error)}.") from error
