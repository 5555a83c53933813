"""What the paper's tables and figures are made of: settings, rows and flags. Its numbers are in paper.yaml beside this file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tasks import recipes


NUMBERS = Path(__file__).with_name("paper.yaml")


@dataclass(frozen=True)
class Setting:
    """
    A data set with a model, and the hyperparameters that the paper prints for it.

    Args:
        task, recipe (`str`): a folder of tasks/, and a file of its recipes/.
        data (`str`): the folder of `--data` that holds the data set.
        rho, rho_max, alpha (`float`): of SAM and XSAM, of XSAM, of WSAM.
        examples (`int`): training images, or sentence pairs.
        flags (`str`): beside the recipe.
        updates (`int`, *optional*): of an epoch, where they are not the examples by the batch.
        hub (`bool`): whether the task finds the data without `--data`.
    """

    task: str
    recipe: str
    data: str
    rho: float
    rho_max: float
    examples: int
    flags: str = ""
    alpha: float = 1.0
    updates: int | None = None
    hub: bool = True


def _cnn(data: str, model: str, rho: float, rho_max: float, alpha: float) -> Setting:
    recipe, dataset, folder = ("cifar-cnn", data, data)
    if data == "tiny-imagenet":
        recipe, dataset, folder = ("tiny-imagenet-cnn", "tiny_imagenet", "tiny-imagenet-200")
    name = "vgg-11-mlp" if model == "vgg-11" else model  # with the three layers at the end that the paper's code has
    flags = f"--dataset {dataset} --model {name}"
    examples = 100_000 if data == "tiny-imagenet" else 50_000
    return Setting("image_classification", recipe, folder, rho, rho_max, examples, flags, alpha)


# The paper's appendix D.
SETTINGS = {
    "cifar10-vgg-11": _cnn("cifar10", "vgg-11", 0.15, 0.30, 0.75),
    "cifar10-resnet-18": _cnn("cifar10", "resnet-18", 0.15, 0.25, 0.5),
    "cifar10-densenet-121": _cnn("cifar10", "densenet-121", 0.05, 0.10, 1.25),
    "cifar100-vgg-11": _cnn("cifar100", "vgg-11", 0.15, 0.30, 1.0),
    "cifar100-resnet-18": _cnn("cifar100", "resnet-18", 0.15, 0.30, 1.25),
    "cifar100-densenet-121": _cnn("cifar100", "densenet-121", 0.10, 0.20, 0.75),
    "tiny-imagenet-vgg-11": _cnn("tiny-imagenet", "vgg-11", 0.20, 1.20, 1.0),
    "tiny-imagenet-resnet-18": _cnn("tiny-imagenet", "resnet-18", 0.20, 0.25, 1.0),
    "tiny-imagenet-densenet-121": _cnn("tiny-imagenet", "densenet-121", 0.20, 0.20, 0.75),
    "imagenet-resnet-50": Setting(
        "image_classification", "imagenet-resnet-50", "imagenet", 0.05, 0.3, 1_281_167, hub=False
    ),
    "iwslt14-transformer": Setting(
        # About 1,100 batches of 4,096 tokens.
        "translation", "iwslt14-transformer", "iwslt14", 0.15, 0.45, 160_239, updates=1100, hub=False
    ),
    "cifar100-vit-ti": Setting("image_classification", "cifar100-vit-ti", "cifar100", 0.9, 0.9, 50_000),
}  # fmt: skip
RESNET, DENSENET = "cifar100-resnet-18", "cifar100-densenet-121"


Rows = dict[str, str]  # what a row is called, and its flags


@dataclass(frozen=True)
class Table:
    """
    A table or a figure.

    Args:
        title (`str`): what it shows.
        rows (`Mapping[str, Rows]`): by setting.
        metric (`str`): `score`, `hours`, `corruptions`, or `eigenvalues`, which the other command tells.
        note (`str`): what the paper's text does not tell, and what stands for it here.
        other (`str`): the command that makes it, from the runs if there are any.
    """

    title: str
    rows: Mapping[str, Rows] = field(default_factory=dict)
    metric: str = "score"
    note: str = ""
    other: str = ""


def _flags(method: str, rho: float, **more: float | str) -> str:
    return " ".join([f"--method {method} --rho {rho:g}", *(f"--{name} {value}" for name, value in more.items())])


def rows_of(setting: str, *methods: str) -> Rows:
    """The paper's methods with its hyperparameters for a setting, one ascent step."""
    of = SETTINGS[setting]
    known = {
        "SGD": "--method sgd",
        "SAM": _flags("sam", of.rho),
        "WSAM": _flags("wsam", of.rho, alpha=of.alpha),
        "XSAM": _flags("xsam", of.rho, rho_max=of.rho_max),
        # ASAM's radius is not printed; 1.0 is that of Kwon et al. 2021 for CIFAR-100.
        "ASAM": _flags("asam", 1.0),
        "VaSSO": _flags("vasso", of.rho),
        "XSAM+ASAM": _flags("xsam+asam", 1.0, rho_max=of.rho_max),
    }
    return {name: known[name] for name in methods}


def _steps(setting: str, methods: tuple[str, ...]) -> Rows:
    """One to three ascent steps, of ρ together. With one step a sum without g_0 is SAM's gradient."""
    of = SETTINGS[setting]
    rows = {}
    for name in methods:
        for k in (1, 2, 3):
            method = "sam" if k == 1 and name in ("LSAM", "MSAM") else name.lower()
            radius = {"rho_max": of.rho_max} if name == "XSAM" else {}
            ascent = {} if k == 1 and method in ("sam", "xsam") else {"ascent_steps": k}
            rows[f"{name}, k = {k}"] = _flags(method, of.rho, **radius, **ascent)
    return rows


# ρ/k and, for it, the α of WSAM and the ρ_max of XSAM (appendix D). How many steps there are is lost.
STEPS, RADII = 2, {0.04: (1.72, 0.30), 0.08: (1.15, 0.25), 0.12: (0.41, 0.20)}


def _radii(methods: tuple[str, ...]) -> Rows:
    rows = {}
    for name in methods:
        for step, (alpha, rho_max) in RADII.items():
            more: dict[str, float] = {"XSAM": {"rho_max": rho_max}, "WSAM": {"alpha": alpha}}.get(name, {})
            rows[f"{name}, ρ/k = {step:.2f}"] = _flags(name.lower(), STEPS * step, **more, ascent_steps=STEPS)
    return rows


def _xsam(values: Mapping[str, Mapping[str, float | str]]) -> Rows:
    of = SETTINGS[RESNET]
    return {label: _flags("xsam", of.rho, **{"rho_max": of.rho_max, **more}) for label, more in values.items()}


ALL = ("SAM", "LSAM", "LSAM+", "MSAM", "MSAM+", "XSAM")
CNNS = [name for name in SETTINGS if name.startswith(("cifar10-", "cifar100-", "tiny-")) and "vit" not in name]
EPOCH = 400  # updates: 50,000 images in batches of 125
ONE_STEP = {0.1: 1.57, 0.2: 1.15, 0.3: 0.92}  # ρ, and the α of WSAM for it (appendix D)
K_LOST = f"How many ascent steps is lost; {STEPS} here."
BUILD = "--trainer tasks/image_classification/surface.py:build"
SHARPEST = "cifar10-resnet-18"  # tables and figures of how flat the end of training is
SEARCHES = f"scripts/run report runs/paper-{RESNET}"

TABLES: dict[str, Table] = {
    "table-1": Table("Hours of a training", {s: rows_of(s, "SAM", "XSAM") for s in CNNS}, metric="hours"),
    "table-2": Table("Test accuracy, one ascent step", {s: rows_of(s, "SGD", "SAM", "XSAM") for s in CNNS}),
    "table-3": Table(
        "ImageNet, IWSLT14 and ViT-Ti",
        {s: rows_of(s, "SAM", "XSAM") for s in ("imagenet-resnet-50", "iwslt14-transformer", "cifar100-vit-ti")},
    ),
    "table-4": Table("One to three ascent steps", {RESNET: _steps(RESNET, ALL)}),
    "table-10": Table(
        "XSAM with ASAM",
        {RESNET: rows_of(RESNET, "SAM", "ASAM", "XSAM", "XSAM+ASAM")},
        note="ASAM's ρ is not printed; 1.0 here, of Kwon et al. 2021.",
    ),
    "table-11": Table(
        "Other variants of SAM",
        {s: rows_of(s, "SAM", "ASAM", "VaSSO", "WSAM", "XSAM", "XSAM+ASAM") for s in (RESNET, DENSENET)},
        note="ASAM's ρ (1.0 here) and VaSSO's share (0.4 here) are not printed.",
    ),
    "table-12": Table("Several steps of several lengths", {RESNET: _radii(ALL)}, note=K_LOST),
    "table-13": Table("One to three steps, DenseNet-121", {DENSENET: _steps(DENSENET, ("LSAM", "MSAM", "XSAM"))}),
    "table-14": Table(
        "One to three steps, CIFAR-10", {"cifar10-resnet-18": _steps("cifar10-resnet-18", ("LSAM", "MSAM", "XSAM"))}
    ),
    "table-15": Table(
        "Corrupted images",
        {
            s: rows_of(s, "SGD", "SAM", "XSAM")
            for s in (RESNET, "cifar10-resnet-18", DENSENET, "cifar10-densenet-121")
        },
        metric="corruptions",
    ),
    "table-16": Table(
        "Largest eigenvalues of the Hessian",
        {SHARPEST: rows_of(SHARPEST, "SGD", "SAM", "XSAM")},
        metric="eigenvalues",
        other=f"python -m xsam_hf.analysis hessian SGD=CHECKPOINT SAM=CHECKPOINT XSAM=CHECKPOINT {BUILD}",
    ),
    "figure-1": Table(
        "The loss around the weights (also figures 5 to 10)",
        {RESNET: rows_of(RESNET, "SAM")},
        other=f"python -m xsam_hf.analysis plane CHECKPOINT {BUILD} --rho 0.15",
    ),
    "figure-2": Table("α over training", {RESNET: rows_of(RESNET, "XSAM")}, other=SEARCHES),
    "figure-3a": Table("Paths on a function of two parameters", other="python -m xsam_hf.analysis toy"),
    "figure-3b": Table(
        "Accuracy by ρ, one step",
        {
            RESNET: {
                f"{name}, ρ = {rho:.2f}": _flags(name.lower(), rho, **more)
                for rho, alpha in ONE_STEP.items()
                for name, more in (("SAM", {}), ("WSAM", {"alpha": alpha}), ("XSAM", {"rho_max": 0.3}))
            }
        },
    ),
    "figure-3c": Table("Accuracy by ρ, several steps", {RESNET: _radii(("SAM", "WSAM", "XSAM"))}, note=K_LOST),
    "figure-4": Table(
        "Accuracy by how often α is searched",
        {
            RESNET: _xsam(
                {
                    **{f"every {n} updates": {"alpha_search_steps": n} for n in (40, 100, 200)},
                    "every epoch": {},
                    **{f"every {n} epochs": {"alpha_search_steps": n * EPOCH} for n in (2, 5, 10)},
                }
            )
        },
        note="The figure's values are lost.",
    ),
    "figure-11": Table(
        "The loss along g_0 and g_1 (also figure 12)",
        {RESNET: rows_of(RESNET, "SAM")},
        other=f"python -m xsam_hf.analysis gain CHECKPOINT {BUILD} --rho 0.15",
    ),
    "figure-13": Table(
        "α over training, other models",
        {s: rows_of(s, "XSAM") for s in CNNS if s != RESNET},
        other="scripts/run report runs/paper-SETTING",
    ),
    "figure-14a": Table(
        "Accuracy by ρ_max",
        {RESNET: _xsam({f"ρ_max = {r:g}": {"rho_max": r} for r in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9)})},
        note="The figure's values are lost.",
    ),
    "figure-14b": Table("ψ and α over training", {RESNET: rows_of(RESNET, "XSAM")}, other=SEARCHES),
    "figure-14c": Table(
        "‖g_0‖ and ‖g_k‖ over training, three steps",
        {RESNET: {"XSAM, k = 3": _steps(RESNET, ("XSAM",))["XSAM, k = 3"]}},
        note="xsam/grad_norm_first and xsam/grad_norm_last are in the runs' trainer_state.json.",
    ),
    "figure-15": Table(
        "The loss around the end of training",
        {SHARPEST: rows_of(SHARPEST, "SGD", "SAM", "XSAM")},
        other=f"python -m xsam_hf.analysis landscape SGD=CHECKPOINT SAM=CHECKPOINT XSAM=CHECKPOINT {BUILD}",
    ),
    "figure-16": Table(
        "Average sharpness at the end of training",
        {SHARPEST: rows_of(SHARPEST, "SGD", "SAM", "XSAM")},
        other=f"python -m xsam_hf.analysis sharpness SGD=CHECKPOINT SAM=CHECKPOINT XSAM=CHECKPOINT {BUILD}",
    ),
    "figure-17": Table(
        "Gradient scales",
        {RESNET: _xsam({"last": {}, **{s: {"gradient_scale": s} for s in ("first", "mean", "max", "slope", "slope_max")}})},
        note="The formulas of two simple extensions are lost; mean and max here.",
    ),
    "wsam-grid": Table(
        "The grid from which WSAM's α is chosen",
        {
            RESNET: {
                f"α = {alpha:g}": _flags("sam", 0.15) if alpha == 1 else _flags("wsam", 0.15, alpha=alpha)
                for alpha in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
            }
        },
    ),
}  # fmt: skip


def slug(flags: str) -> str:
    """A name for a folder that tells the flags: `--method xsam --rho 0.15` is `xsam-rho-0.15`."""
    return re.sub(r"\s+(--)?", "-", flags.removeprefix("--method").strip())


@dataclass(frozen=True)
class Number:
    """Mean and standard deviation as the paper prints them."""

    mean: float
    std: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def numbers(table: str, setting: str) -> dict[str, Number | dict[str, Number]]:
    """What the paper says of a setting in a table, by row; nothing where it says nothing."""
    found = _all_numbers().get(table.replace("-", " "), {}).get(setting, {})
    return {
        row: {k: _number(v) for k, v in cell.items()} if isinstance(cell, Mapping) else _number(cell)
        for row, cell in found.items()
    }


@cache
def _all_numbers() -> dict:
    return recipes.read(NUMBERS)


def _number(cell: str | float) -> Number:
    mean, _, std = str(cell).partition("±")
    return Number(float(mean), float(std) if std else None)


def deviations(mean: float, std: float | None, paper: Number) -> float | None:
    """
    How far a mean is from the paper's, in standard deviations over the seeds: the root of the mean of both variances, or the paper's
    alone where there is one seed. Nothing where no deviation is known, or it is 0.
    """
    if paper.std is None:
        return None
    unit = paper.std if std is None else math.sqrt((paper.std**2 + std**2) / 2)
    return (mean - paper.mean) / unit if unit else None
