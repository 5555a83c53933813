"""The images: where they come from, and how they are split."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms import v2
from transformers.utils import logging

from tasks.image_classification import archives, folders, hub_files
from tasks.image_classification.augmentation import Augmentation
from tasks.image_classification.catalogue import DATASETS, Images
from tasks.image_classification.hub_files import Arrays
from tasks.image_classification.labelled_images import Pictures, Split


logger = logging.get_logger(__name__)


def load(
    name: str,
    data_dir: str | None = None,
    validation_share: float = 0.1,
    cutout: int = 0,
    seed: int = 0,
    train_examples: int | None = None,
    label_noise: float = 0.0,
    test_examples: int | None = None,
    cutout_probability: float | None = None,
    random_erasing: float | None = None,
    padding_mode: str | None = None,
    no_aug: bool = False,
) -> dict[str, Split | Pictures]:
    """
    The data set's `train`, `validation` and `test` splits.

    The test split is the data set's own (digits, which has none: a fifth). `validation_share` of the training images, drawn
    with equal shares of every class and always the same whatever `seed` is, are held out for validation.

    Args:
        name (`str`): one of `DATASETS`.
        data_dir (`str`, *optional*): a local copy; see `archives.read` for what it may hold. Else the hub.
        validation_share (`float`, *optional*, defaults to 0.1): 0 trains on everything and leaves `validation` empty.
        cutout (`int`, *optional*, defaults to 0): edge in pixels of a square that is blanked out in every training image.
        seed (`int`, *optional*, defaults to 0): of the random crops and flips.
        train_examples (`int`, *optional*): train on so many, drawn with equal shares of every class, always the same.
        label_noise (`float`, *optional*, defaults to 0.0):
            Share of the training labels that are replaced by one of the other classes, always the same ones. Validation and
            test labels stay right.
        test_examples (`int`, *optional*): score so many test images, drawn as `train_examples` are.
        cutout_probability, random_erasing, padding_mode (*optional*): see [`Augmentation`].
        no_aug (`bool`, *optional*, defaults to `False`): whether training sees the images as they are, without crops and flips.

    Raises:
        `ValueError`: an argument is out of range, or `data_dir` holds no such data.
    """
    if name not in DATASETS:
        raise ValueError(f"`dataset` is {name!r}: choose one of {', '.join(DATASETS)}.")
    if not 0 <= validation_share < 1:
        raise ValueError(f"`validation_share` is {validation_share}: give a share from 0 to below 1.")
    if not 0 <= label_noise < 1:
        raise ValueError(f"`label_noise` is {label_noise}: give a share from 0 to below 1.")
    images = DATASETS[name]
    augmentation = _augmentation(images, cutout, cutout_probability, random_erasing, padding_mode)
    if no_aug and (cutout or random_erasing or padding_mode):
        raise ValueError(
            "`no_aug` leaves the images as they are: leave it out, or `cutout`, `random_erasing` and `padding_mode`."
        )
    varied = not (no_aug or augmentation.is_none)
    if name == "digits" and data_dir is not None:
        raise ValueError(
            f"`data_dir` is {data_dir}, but digits come with scikit-learn: leave it out, or give another `dataset`."
        )
    (x, y), test = _digits() if name == "digits" else _read(name, data_dir)
    if not images.on_disk:
        _warn_of_another_data_set(name, training=x, test=test[0])
    if name != "digits" and not images.on_disk:
        _refuse_repetitions(x, test[0], data_dir or images.hub)
    if len(test[1]) > len(y):
        logger.warning(f"There are {len(y)} training images and {len(test[1])} test images: are the two exchanged?")
    for split, classes in (("training", y), ("test", test[1])):
        missing = sorted(set(range(images.classes)) - set(classes.tolist()))
        if missing:
            logger.warning(
                f"No {split} image is of class {missing[0]}, and {len(missing)} of {images.classes} have none."
            )
    rows = np.arange(len(y))
    held_out = rows[:0]
    if validation_share:
        try:
            rows, held_out = train_test_split(rows, test_size=validation_share, random_state=0, stratify=y)
        except ValueError as error:
            raise ValueError(
                f"`validation_share` is {validation_share}, of {len(y)} training images: {error}"
            ) from error
    if train_examples is not None:
        rows = equal_shares("train", train_examples, rows, y, images)
    if test_examples is not None:
        kept = equal_shares("test", test_examples, np.arange(len(test[1])), test[1], images)
        test = test[0][kept], test[1][kept]
    labels = _with_noise(y[rows], label_noise, images.classes)
    wrong = labels != y[rows]
    scored = {"validation": (x[held_out], y[held_out]), "test": test}
    if wrong.any():
        scored["wrong_labels"] = x[rows][wrong], labels[wrong]
    if images.on_disk:
        return {
            "train": Pictures(x[rows], labels, images, varied=not no_aug, seed=seed),
            **{split: Pictures(*of, images) for split, of in scored.items()},
        }
    return {
        "train": Split(x[rows], labels, augmentation, seed) if varied else Split(_middle(x[rows], images), labels),
        **{split: Split(_middle(pixels, images), of) for split, (pixels, of) in scored.items()},
    }


def _augmentation(
    images: Images,
    cutout: int,
    cutout_probability: float | None,
    random_erasing: float | None,
    padding_mode: str | None,
) -> Augmentation:
    """
    What the arguments ask for.

    Raises:
        `ValueError`: one is out of range, or plays no part with these images.
    """
    if not 0 <= cutout <= images.size:
        raise ValueError(f"`cutout` is {cutout}: give an edge from 0 to the images' {images.size} pixels.")
    for name, share in (("cutout_probability", cutout_probability), ("random_erasing", random_erasing)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"`{name}` is {share}: give a share of the images, from 0 to 1.")
    if cutout_probability is not None and not cutout:
        raise ValueError(
            f"`cutout_probability` is {cutout_probability}, and `cutout` 0: give its edge, or leave it out."
        )
    if cutout and random_erasing:
        raise ValueError(f"`cutout` is {cutout} and `random_erasing` {random_erasing}: give one of the two.")
    if padding_mode not in (None, "constant", "reflect"):
        raise ValueError(f"`padding_mode` is {padding_mode}: give constant or reflect, or leave it out.")
    if padding_mode is not None and not images.padding:
        raise ValueError(f"`padding_mode` is {padding_mode}, and these images are not padded: leave it out.")
    if images.on_disk and (cutout or random_erasing):
        raise ValueError("`cutout` and `random_erasing` are for images that fit into memory: leave them out.")
    share = 1.0 if cutout_probability is None else cutout_probability
    return Augmentation(images, cutout, share, random_erasing or 0.0, padding_mode)


def equal_shares(split: str, examples: int, rows: np.ndarray, y: np.ndarray, images: Images) -> np.ndarray:
    """
    Some of the rows, with equal shares of every class, always the same.

    Raises:
        `ValueError`: there are no more of them, or fewer are asked for than there are classes.
    """
    if not images.classes <= examples < len(rows):
        raise ValueError(
            f"`{split}_examples` is {examples}: "
            + (f"give {images.classes} or more and fewer than" if images.classes < len(rows) else "leave it out, with")
            + f" the {len(rows)} there are, of {images.classes} classes."
        )
    try:
        return train_test_split(rows, train_size=examples, random_state=0, stratify=y[rows])[0]
    except ValueError as error:
        what = "training" if split == "train" else split
        raise ValueError(f"`{split}_examples` is {examples}, of {len(rows)} {what} images: {error}") from error


def _middle(pixels: np.ndarray, images: Images) -> np.ndarray:
    """Images as they are scored: the middle of each at the size that a model gets."""
    if images.resize is None:
        return pixels
    parts = []
    for start in range(0, len(pixels), 1000):
        part = torch.from_numpy(pixels[start : start + 1000]).movedim(3, 1)
        part = v2.functional.center_crop(v2.functional.resize(part, [images.resize]), [images.size])
        parts.append(part.movedim(1, 3).numpy())
    return np.concatenate(parts) if parts else np.empty((0, images.size, images.size, images.channels), np.uint8)


def _warn_of_another_data_set(name: str, **parts: np.ndarray) -> None:
    for part, x in parts.items():
        mean = (x.mean(axis=(0, 1, 2)) / 255).round(3)
        ours, theirs = mean[0] - mean[-1], DATASETS[name].mean[0] - DATASETS[name].mean[-1]  # of red and blue
        if ours < -0.02 and theirs > 0.02:
            logger.warning(
                f"The {part} images are more blue than red, and those of {name} more red: are the two exchanged?"
            )
        # MNIST's files, for instance, have the names of Fashion-MNIST's.
        if np.abs(mean - DATASETS[name].mean).max() > 0.05:
            logger.warning(
                f"The {part} pixels' mean is {mean.tolist()}, and that of {name} {list(DATASETS[name].mean)}: is it that data set?"
            )


def digests(images: np.ndarray) -> list[bytes]:
    """What stands for each image: the same for the same pixels."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def _refuse_repetitions(train: np.ndarray, test: np.ndarray, where: str | None) -> None:
    """
    Refuses images that come again where they are scored: a file under two names, a copy beside it.

    The data sets have a few such images themselves, far below a tenth.

    Raises:
        `ValueError`: more than a tenth of the test images are training images too, or as many of either are there twice: the validation
            images are taken from those for training.
    """
    known, scored = set(digests(train)), digests(test)
    again = sum(digest in known for digest in scored)
    if again > len(test) / 10:
        raise ValueError(
            f"{where}: {again} of the {len(test)} test images are training images too, and scores of them mean nothing."
        )
    twice = len(test) - len(set(scored))
    if twice > len(test) / 10:
        raise ValueError(
            f"{where}: {twice} of the {len(test)} test images are copies of others, and would count twice: is a file there twice?"
        )
    if len(known) == 1 and len(train) > 1:
        raise ValueError(
            f"{where}: all {len(train)} training images are the same picture: were they read or made wrongly?"
        )
    twice = len(train) - len(known)
    if twice > len(train) / 10:
        raise ValueError(
            f"{where}: {twice} of the {len(train)} training images are copies of others, and a copy of one that is held out would be "
            "trained on: is a file there twice?"
        )


def _with_noise(labels: np.ndarray, share: float, classes: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    count = round(share * len(labels))
    if share and not count:
        raise ValueError(
            f"`label_noise` is {share}, less than one of {len(labels)} labels: give more, or leave it out."
        )
    wrong = generator.choice(len(labels), count, replace=False)
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return labels


def _digits() -> tuple[Arrays, Arrays]:
    digits = load_digits()  # 1797 images of 8×8 in 17 levels of grey, 0 to 16
    x = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    rows, test = train_test_split(np.arange(len(x)), test_size=0.2, random_state=0, stratify=digits.target)
    return (x[rows], digits.target[rows]), (x[test], digits.target[test])


def _read(name: str, data_dir: str | None) -> tuple[Arrays, Arrays]:
    if DATASETS[name].on_disk:
        if data_dir is None:
            raise ValueError(
                f"`dataset` {name} is read from folders of its pictures: give their folder as `data_dir`."
            )
        train, test = ((np.array(files, dtype=object), labels) for files, labels in folders.imagenet(Path(data_dir)))
        return train, test
    if data_dir is not None:
        return archives.read(name, Path(data_dir))
    if name == "fashion_mnist" and archives.DEBIAN_FASHION_MNIST.is_dir():
        return archives.read(name, archives.DEBIAN_FASHION_MNIST)
    return hub_files.from_hub(name)
