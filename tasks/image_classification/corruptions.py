"""
Scores trained models on corrupted test images: CIFAR-10-C and CIFAR-100-C (Hendrycks & Dietterich 2019, arXiv:1903.12261).

    python -m tasks.image_classification.corruptions runs/NAME/seed-0 --data_dir CIFAR-100-C

Writes `corruptions.json` into each run's folder: the accuracy of each of the 19 corruptions over five severities, of the paper's four
groups, and of all. With `--made`, the test images are corrupted here by the package imagecorruptions-imaug, once for all runs that are
given, with ImageNet-C's severities, which are not CIFAR-C's: such figures compare with each other only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from tasks.command import Parser, run, sentence
from tasks.files import refuse_a_copy, write_whole
from tasks.image_classification import archives, hub_files, models, pixels
from tasks.image_classification.catalogue import DATASETS
from tasks.image_classification.data import digests, equal_shares
from tasks.runs import RESULT


# The paper's four groups: it prints no list, but only 4, 5, 3 and 7 corruptions make all 12 of its overall means of its group means.
# So brightness and spatter are not with the weather, where others have them.
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog"),
    "digital": (
        *("brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression", "spatter", "saturate"),
    ),
}
NAMES = tuple(name for group in GROUPS.values() for name in group)
FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
SEVERITIES = 5
SEEDED = ("impulse_noise", "glass_blur")
FILE = "corruptions.json"

Images = tuple[np.ndarray, np.ndarray]  # (N, H, W, C) in uint8, labels (N,)


def stored(dataset: str, folder: Path) -> Iterator[tuple[str, Images]]:
    """
    Each corruption's images of all severities, from a folder of `.npy` files as they are published.

    Raises:
        `ValueError`: a file is missing, damaged or another's copy, or not of this data set with its five severities, or more than a tenth
            of its images are copies of others.
    """
    missing = [name for name in (*NAMES, "labels") if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]}.npy, and {len(missing)} of {len(NAMES) + 1} files: give the folder "
            f"{FOLDERS[dataset]}, as it is unpacked."
        )
    images = DATASETS[dataset]
    labels = hub_files.checked_labels(
        np.atleast_1d(_array(folder / "labels.npy")).tolist(), images, f"{folder}/labels.npy"
    )
    absent = sorted(set(range(images.classes)) - set(labels.tolist()))
    if absent:
        raise ValueError(
            f"{folder}/labels.npy has no label {absent[0]}, and {len(absent)} of the {images.classes} classes of {dataset} are missing: is it "
            f"{FOLDERS[dataset]}?"
        )
    if len(labels) % SEVERITIES or (labels != np.tile(labels[: len(labels) // SEVERITIES], SEVERITIES)).any():
        raise ValueError(
            f"{folder}/labels.npy does not hold the same labels {SEVERITIES} times, once for each severity: fetch it and the others again."
        )
    refuse_a_copy([folder / f"{name}.npy" for name in NAMES], "images")
    for name in NAMES:
        x = _array(folder / f"{name}.npy")
        if x.shape != (len(labels), *images.shape) or x.dtype != np.uint8:
            raise ValueError(
                f"{folder / name}.npy holds {x.dtype} of {x.shape}, and labels.npy {len(labels)} labels: fetch both again."
            )
        twice = len(x) - len(set(digests(x)))
        if twice > len(x) / 10:  # a few are: a grey one stays the same under some severities of saturate
            raise ValueError(
                f"{folder / name}.npy: {twice} of its {len(x)} images are copies of others: it broke off, or has a severity twice, so fetch it again."
            )
        yield name, (x, labels)


def _array(file: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(file, mode="r")  # which takes neither archives nor pickles
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is cut off, damaged or no array ({sentence(error)}): fetch it again.") from error


def made(test: Images) -> Iterator[tuple[str, Images]]:
    """
    Each corruption of test images at all severities, made by imagecorruptions-imaug; always the same for the same images.

    Raises:
        `ValueError`: the package is not installed.
    """
    try:
        from imagecorruptions import corrupt
    except ImportError:
        raise ValueError(
            "`--made` needs the package imagecorruptions-imaug: install it, or give CIFAR-C's files as `--data_dir`."
        ) from None
    x, labels = test
    for name in NAMES:
        state = np.random.get_state()
        np.random.seed(0)  # which it draws from, but for two that take a seed of each image's own
        try:
            images = [
                corrupt(image, corruption_name=name, severity=s + 1, **({"seed": i} if name in SEEDED else {}))
                for s in range(SEVERITIES)
                for i, image in enumerate(x)
            ]
        finally:
            np.random.set_state(state)
        yield name, (np.stack(images).astype(np.uint8), np.tile(labels, SEVERITIES))


def score(corrupted: Iterator[tuple[str, Images]], *rights: Callable[[np.ndarray, np.ndarray], float]) -> list[dict]:
    """For each model, its accuracies on each corruption and on the groups; `corrupted` is the mean of all 19."""
    found = [(name, [right(*of) for right in rights]) for name, of in corrupted]
    results = []
    for i in range(len(rights)):
        shares = {name: of[i] for name, of in found}
        groups = {group: fmean(shares[name] for name in names) for group, names in GROUPS.items()}
        results.append({"groups": {**groups, "corrupted": fmean(shares.values())}, "corruptions": shares})
    return results


def accuracy(
    model: torch.nn.Module, device: torch.device, batch: int = 500
) -> Callable[[np.ndarray, np.ndarray], float]:
    """What tells the share of images that a model, which takes bytes, classes right; ties and NaN count as wrong."""

    @torch.no_grad()
    def right(x: np.ndarray, labels: np.ndarray) -> float:
        count = 0
        for start in range(0, len(x), batch):
            part = torch.from_numpy(np.ascontiguousarray(x[start : start + batch].transpose(0, 3, 1, 2)))
            logits = model(pixel_values=part.to(device)).logits
            best, target = logits.topk(2), torch.from_numpy(labels[start : start + batch].astype(np.int64)).to(device)
            certain = (best.values[:, 0] > best.values[:, 1]) & logits.isfinite().all(dim=1)
            count += int(((best.indices[:, 0] == target) & certain).sum())
        return count / len(x)

    return right


def load(folder: Path) -> tuple[torch.nn.Module, str]:
    """
    The model of a finished run, which takes bytes, and its data set.

    Raises:
        `ValueError`: there is no such run, or it or its model is of other images.
    """
    try:
        result: Mapping = json.loads((folder / RESULT).read_bytes())
        dataset = result["dataset"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is not a finished run of image classification ({sentence(error)}).") from error
    if dataset not in FOLDERS:
        raise ValueError(
            f"{folder} was trained on {dataset}, and there are corrupted images of {' and '.join(FOLDERS)} only."
        )
    model, images = models.load(folder), DATASETS[dataset]
    for name, right, told in (
        ("num_labels", images.classes, "tells {} classes apart"),
        ("num_channels", images.channels, "takes images of {} channels"),
        ("image_size", images.size, "takes images of {} pixels"),
    ):
        found = getattr(model.config, name, right)
        if found != right:
            raise ValueError(
                f"{folder}'s {RESULT} says {dataset}, and its model {told.format(found)}: they are of two runs, so give the folder of one."
            )
    pixels.accept_bytes(model, images)
    return model.eval(), dataset


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--data_dir", type=Path, help="CIFAR-10-C or CIFAR-100-C; with --made the data set's own folder"
    )
    parser.add_argument("--made", action="store_true", help="corrupt the test images here")
    parser.add_argument(
        "--test_examples",
        type=int,
        help="with --made: so many of them, with equal shares of every class; default: all",
    )
    args = parser.parse_args(argv)
    trained, (dataset, *others) = zip(*map(load, args.runs), strict=True)
    if other := next((name for name in others if name != dataset), None):
        raise ValueError(f"Some runs were trained on {dataset}, and some on {other}: score them one after the other.")
    if args.data_dir is None:
        raise ValueError(
            "`data_dir` is missing: give the folder of the corrupted images, or with `--made` of the data set."
        )
    if args.made:
        x, labels = archives.read(dataset, args.data_dir)[1]
        if args.test_examples is not None:
            kept = equal_shares("test", args.test_examples, np.arange(len(labels)), labels, DATASETS[dataset])
            x, labels = x[kept], labels[kept]
        images = made((x, labels))
    elif args.test_examples is None:
        images = stored(dataset, args.data_dir)
    else:
        raise ValueError("`test_examples` is for `--made`: the files are scored as a whole.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = (
        {"made_by": "imagecorruptions-imaug", "test_examples": len(labels)}
        if args.made
        else {"made_by": FOLDERS[dataset]}
    )
    for folder, found in zip(
        args.runs, score(images, *(accuracy(model.to(device), device) for model in trained)), strict=True
    ):
        write_whole(folder / FILE, json.dumps({**facts, **found}, indent=2) + "\n")
        print(f"{folder}: " + " ".join(f"{name} {100 * value:.2f}" for name, value in found["groups"].items()))


if __name__ == "__main__":
    run(main)
