"""The study's methods, and the settings that it trains with each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """
    One method of the study.

    Args:
        flags (`str`): the task's, without `rho`.
        stretch (`float`): where the search for `rho` starts, as a multiple of the recipe's. `None`: there is no `rho` to tune.
        epochs (`int`): as a multiple of the recipe's.
    """

    flags: str
    stretch: float | None = None
    epochs: int = 1


METHODS = {
    "base": Method("--method sgd"),
    "base-2x": Method("--method sgd", epochs=2),
    "sam": Method("--method sam", stretch=1),
    "xsam": Method("--method xsam", stretch=1.2),
    "stale-sam": Method("--method stale-sam", stretch=1.4),
    "stale-xsam": Method("--method stale-xsam", stretch=1.4),
    "fraction.1": Method("--method xsam --ascent_fraction 0.1", stretch=2),
    "fraction.25": Method("--method xsam --ascent_fraction 0.25", stretch=1.4),
    "wsam.5": Method("--method wsam --alpha 0.5", stretch=1),  # the paper's α for ResNet-18 on CIFAR-10
    "late.3": Method("--method xsam --sharpness_start 0.7", stretch=1.4),
    "xsam+asam": Method("--method xsam+asam", stretch=8),
}


# In tables: plain training, then by what an update costs.
ORDER = ("base", "base-2x", "base, best epoch", "base-2x, best epoch", *list(METHODS)[2:])


@dataclass(frozen=True)
class Setting:
    """
    Args:
        recipe (`str`): of the task.
        short, title (`str`): for the head of a column, and of a table.
        flags (`str`): for all runs.
        base_flags (`str`): for the runs of `base` and `base-2x`, whose best epoch is looked for.
        seeds (`int`): how many.
        tuning_seeds (`Sequence[int]`): those that `rho` is chosen by.
        task (`str`): a folder of tasks/.
        metrics (`Sequence[str]`): the scores that tables show; `rho` is chosen by the first.
        chance (`float`): what a guess scores.
        earlier (`str`, *optional*): a file of results/ with an older study of the same recipe, whose methods have the task's names.
    """

    recipe: str
    short: str
    title: str
    flags: str = ""
    base_flags: str = ""
    seeds: int = 10
    tuning_seeds: Sequence[int] = (100, 101)
    task: str = "image_classification"
    metrics: Sequence[str] = ("accuracy",)
    chance: float = 0.1
    earlier: str | None = None


SETTINGS = {
    "digits-noise": Setting(
        "digits-noise-resnet-small", "digits, CNN", "Digits, 30 % of the labels wrong, residual CNN, SGD"
    ),
    "digits-noise-vit": Setting(
        "digits-noise-vit-small",
        "digits, ViT",
        "Digits, 500 images, 30 % of the labels wrong, small ViT, AdamW",
        seeds=5,
        tuning_seeds=(100,),
    ),
    "fashion-noise": Setting(
        "fashion-mnist-noise-resnet-small",
        "Fashion-MNIST, CNN",
        "Fashion-MNIST, 1,000 images, 20 % of the labels wrong, residual CNN, SGD",
        base_flags="--eval_strategy steps --eval_steps 128",  # every eighth epoch: ten thousand test images
        seeds=5,
    ),
    "fashion-noise-aug": Setting(
        "fashion-mnist-noise-resnet-small",
        "Fashion-MNIST, CNN, crops",
        "Fashion-MNIST, 1,000 images with flips and crops, 20 % of the labels wrong, residual CNN, SGD",
        flags="--no_aug false",
        seeds=5,
    ),
    "cifar10": Setting(
        "cifar10-resnet-small",
        "CIFAR-10, CNN",
        "CIFAR-10 (JPEG copies), 500 images with flips and crops, right labels, residual CNN, SGD",
        seeds=5,
        tuning_seeds=(100,),
    ),
    "cifar100": Setting(
        "cifar100-resnet-small",
        "CIFAR-100, CNN",
        "CIFAR-100, 1,000 images, right labels, residual CNN, SGD",
        seeds=5,
        tuning_seeds=(100,),
        chance=0.01,
    ),
    "cifar100-vit": Setting(
        "cifar100-vit-small",
        "CIFAR-100, ViT",
        "CIFAR-100, 1,000 images, right labels, small ViT, AdamW",
        seeds=3,
        tuning_seeds=(100,),
        chance=0.01,
    ),
    "multi30k": Setting(
        "multi30k-part-small",
        "Multi30k, Transformer",
        "Multi30k, 3,000 pairs, German to English, small Transformer, AdamW",
        seeds=3,
        tuning_seeds=(100,),
        task="translation",
        metrics=("bleu_tokenised", "bleu_detokenised", "chrf"),
        chance=1,  # of 100; less is noise
    ),
    "iwslt14-part": Setting(
        "iwslt14-part-small",
        "IWSLT14 (part), Transformer",
        "IWSLT14, 8,639 of its 160,239 pairs, German to English, small Transformer, AdamW",
        seeds=3,
        tuning_seeds=(100,),
        task="translation",
        metrics=("bleu_tokenised", "bleu_detokenised", "chrf"),
        chance=1,  # of 100; less is noise
    ),
    "fashion-noise-vit": Setting(
        "fashion-mnist-noise-vit-small",
        "Fashion-MNIST, ViT",
        "Fashion-MNIST, 300 images, 20 % of the labels wrong, small ViT, AdamW",
        seeds=5,
        earlier="noise",
    ),
}
