"""The method's hyperparameters: one plain dataclass, each field declared, explained and checked once."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


Perturbation = Literal["sam", "asam", "vasso", "fsam", "stale"]
Direction = Literal["arc", "lsam", "lsam+", "msam", "msam+"]
GradientScale = Literal["last", "first", "mean", "max", "slope", "slope_max"]

_OPTIONAL = ("rho_max", "alpha_search_steps")
_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("rho", lambda v: v >= 0, "a finite length, 0.05 for instance, or 0 to switch XSAM off"),
    ("ascent_steps", lambda v: v >= 1 and v == int(v), "1 or more; for none at all set `rho` to 0"),
    ("rho_max", lambda v: v > 0, "a length above 0, or leave it out for 2 * rho"),
    ("alpha_max", lambda v: v > 0, "an end of the grid above 0 (the paper's is 2)"),
    ("alpha_samples", lambda v: v >= 2 and v == int(v), "2 points or more (the paper's grid is 21)"),
    (
        "alpha_search_steps",
        lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
        "a whole number of updates, a share of training between 0 and 1, or leave it out to search at the first update "
        "of every epoch",
    ),
    ("ascent_fraction", lambda v: 0 < v <= 1, "a share of the update batch above 0, up to 1"),
    ("sharpness_start", lambda v: 0 <= v <= 1, "a share of training from 0 to 1"),
    ("sharpness_end", lambda v: 0 <= v <= 1, "a share of training from 0 to 1"),
    ("sharpness_every", lambda v: v >= 1 and v == int(v), "1 for every update, or n for every n-th"),
    ("asam_eta", lambda v: v >= 0, "0 or more (the authors' is 0.01)"),
    ("vasso_decay", lambda v: 0 < v <= 1, "a share above 0, up to 1 (the authors' is 0.4)"),
    ("fsam_sigma", lambda v: v >= 0, "0 or more (the authors' is 1)"),
    ("fsam_lambda", lambda v: 0 <= v < 1, "a share from 0 to below 1 (the authors' is 0.6 to 0.95)"),
    ("stale_decay", lambda v: 0 <= v < 1, "a share from 0 to below 1 (0.5 did best)"),
]


@dataclass
class XSAMArguments:
    """
    The method's hyperparameters, each of them also a field of [`XSAMTrainingArguments`] and a command-line flag.

    What a field means is said once, in its `help`. In groups:

    - the method: `rho`, `ascent_steps`, `alpha`, `rho_max`, `perturbation`, `direction`, `gradient_scale`;
    - the search for α: `alpha_max`, `alpha_samples`, `alpha_search_steps`;
    - which weights, and whose gradients: `rho_exclude`, `ascent_scope`, `perturbation_dtype`;
    - fewer than two passes an update: `ascent_fraction`, `sharpness_start`, `sharpness_end`, `sharpness_every`;
    - of one perturbation alone: `asam_eta`, `asam_scope`, `vasso_decay`, `fsam_sigma`, `fsam_lambda`, `stale_decay`.

    Raises:
        `ValueError`: a value is out of range or unknown; the message names the field, the value and the way out.
        `TypeError`: a class that inherits from this one and from another has a field of both, with two meanings.
    """

    rho: float = field(
        default=0.05,
        metadata={
            "help": "Total ascent length, in the 2-norm of all trainable weights; each of the k steps is rho / k long. 0 switches "
            "everything off: the plain optimizer, one pass. Denoted rho in the paper."
        },
    )
    ascent_steps: int = field(
        default=1,
        metadata={"help": "Number of ascent steps; an update costs one pass more than that. Denoted k in the paper."},
    )
    perturbation: Perturbation = field(
        default="sam",
        metadata={
            "help": "Where to climb: along the gradient (sam), scaled by the weights' sizes (asam), along a running average "
            "(vasso), away from one (fsam), or along a running average of earlier updates' gradients (stale). The last takes one "
            "pass an update, and the reported loss is L(θ_0 + ε)."
        },
    )
    direction: Direction = field(
        default="arc",
        metadata={
            "help": "Where to descend: on the arc (XSAM; SAM with alpha=1), or along a sum of the gradients on the way up: lsam, "
            "msam, or with the first gradient lsam+, msam+."
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Position on the arc. Not given: searched (XSAM). 1: SAM. Another value: fixed, WSAM-like. Denoted alpha in "
            "the paper."
        },
    )
    rho_max: float | None = field(
        default=None,
        metadata={"help": "Radius of the search for alpha, in the same norm as rho. Not given: 2 * rho."},
    )
    alpha_max: float = field(default=2.0, metadata={"help": "End of the grid of the search, which starts at 0."})
    alpha_samples: int = field(
        default=21, metadata={"help": "Points of the grid, both ends included; one forward pass each."}
    )
    alpha_search_steps: float | None = field(
        default=None,
        metadata={
            "help": "How often alpha is searched. Not given: at the first update of every epoch. A whole number: every so many "
            "updates. Below 1: that share of all updates, as for eval_steps."
        },
    )
    gradient_scale: GradientScale = field(
        default="last",
        metadata={
            "help": "Norm of the update's gradient: that of the last gradient on the way up, of the first, their mean or max, or "
            "the slope of the loss to the last point (slope) or to the one on the arc (slope_max, one more forward pass)."
        },
    )
    ascent_scope: Literal["update", "micro"] = field(
        default="update",
        metadata={
            "help": "update: one ascent for the whole update batch, over micro-batches and processes. micro: each micro-batch of "
            "each process climbs on its own (m-sharpness)."
        },
    )
    ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the update batch, drawn at random, that the ascent's gradients are made from: with one ascent step "
            "an update costs 1 + ascent_fraction passes."
        },
    )
    perturbation_dtype: Literal["weights", "stochastic"] = field(
        default="weights",
        metadata={
            "help": "Moved weights in half precision, in which most of a small step is lost in rounding: rounded to the nearest "
            "(weights), or at random, so that on average nothing is lost (stochastic)."
        },
    )
    rho_exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions: weights in whose name one of them is found are trained, but never perturbed."
        },
    )
    sharpness_start: float = field(
        default=0.0, metadata={"help": "Share of training after which XSAM is on; the plain optimizer before."}
    )
    sharpness_end: float = field(
        default=1.0, metadata={"help": "Share of training at which XSAM goes off; the plain optimizer after."}
    )
    sharpness_every: int = field(
        default=1, metadata={"help": "XSAM in every n-th update only, the plain optimizer between."}
    )
    asam_eta: float = field(default=0.01, metadata={"help": "ASAM: what is added to a weight's size. Denoted eta."})
    asam_scope: Literal["weights", "all"] = field(
        default="weights",
        metadata={
            "help": "ASAM: scale weights of two dimensions or more, as its authors do, or all, biases and norms too."
        },
    )
    vasso_decay: float = field(
        default=0.4, metadata={"help": "VaSSO: share of the new gradient in the running average. 1: SAM. Denoted phi."}
    )
    fsam_sigma: float = field(
        default=1.0,
        metadata={"help": "FSAM: how much of the running average is taken off the gradient. 0: SAM. Denoted sigma."},
    )
    fsam_lambda: float = field(
        default=0.9, metadata={"help": "FSAM: share of the past in the running average. Denoted lambda."}
    )

    stale_decay: float = field(
        default=0.5,
        metadata={
            "help": "Stale ascent: share of the past in the running average. 0: the last gradient. Denoted beta."
        },
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        ours = inspect.get_annotations(XSAMArguments)  # as written; HfArgumentParser changes the types of fields
        own = {name: _written(kind) for name, kind in inspect.get_annotations(cls).items() if name in ours}
        # The same type is another default, another type another meaning.
        both = [(name, cls.__name__) for name, kind in own.items() if kind != ours[name]]
        for base in (base for base in cls.__mro__ if not issubclass(base, XSAMArguments)):
            both += [(name, base.__name__) for name in ours if name in getattr(base, "__dataclass_fields__", {})]
        if both:
            name, other = both[0]
            raise TypeError(
                f"`{name}` is a field of XSAMArguments and of {other}, and would have two meanings: leave XSAMArguments out of this "
                "class, and give the method's fields to the trainer's class, `xsam_arguments = XSAMArguments(rho=0.05)`."
            )

    def __post_init__(self):
        self.check_method()
        # `class X(XSAMArguments, TrainingArguments)` is one cooperative chain.
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def check_method(self) -> None:
        """
        Looks at every field of the method's; they may have been set since this was made.

        Raises:
            `ValueError`: a value is out of range or unknown.
        """
        for name, known in _choices().items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        for name in (*(name for name, _, _ in _RANGES), "alpha"):
            value = getattr(self, name)
            if isinstance(value, np.generic):  # from a sweep, for instance; JSON takes Python's numbers alone
                setattr(self, name, value.item())
        for name, allowed, way_out in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not (_is_number(value) and _is_finite(value) and allowed(value)):
                raise ValueError(f"`{name}` is {value!r}: give {way_out}.")
        for name in ("ascent_steps", "alpha_samples", "sharpness_every"):
            setattr(self, name, int(getattr(self, name)))  # 2.0, from a sweep for instance
        if isinstance(self.rho_exclude, str):
            self.rho_exclude = [self.rho_exclude]
        if not isinstance(self.rho_exclude, list | tuple | None):
            raise ValueError(f"`rho_exclude` is {self.rho_exclude!r}: give a list of regular expressions.")
        self.rho_exclude = list(self.rho_exclude or []) or None
        for pattern in self.rho_exclude or []:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"`rho_exclude` is {pattern!r}: give a regular expression ({error}).") from error
        if self.alpha is not None and not (_is_number(self.alpha) and 0 <= self.alpha <= self.alpha_max):
            raise ValueError(
                f"`alpha` is {self.alpha!r}: give a value from 0 to `alpha_max` ({self.alpha_max}), or leave it out to search."
            )
        if self.sharpness_start >= self.sharpness_end:
            raise ValueError(
                f"`sharpness_start` is {self.sharpness_start}: give a share below `sharpness_end` ({self.sharpness_end})."
            )
        for refused, sentence in self._combinations():
            if refused:
                raise ValueError(sentence)

    def _combinations(self):
        """Fields that contradict each other, and the way out."""
        averaging, stale = self.perturbation in ("vasso", "fsam", "stale"), self.perturbation == "stale"
        sloping = self.gradient_scale.startswith("slope")
        yield (
            self.direction != "arc" and self.alpha is not None,
            f"`alpha` is {self.alpha}, but `direction` {self.direction!r} has no arc: leave `alpha` out, or choose `arc`.",
        )
        yield (
            averaging and self.ascent_steps > 1,
            f"`ascent_steps` is {self.ascent_steps}, but {self.perturbation} is defined for a single step along an average of "
            "gradients: set it to 1, or choose the perturbation `sam` or `asam`.",
        )
        for name, value in (
            ("perturbation", averaging and self.perturbation),
            ("gradient_scale", sloping and self.gradient_scale),
        ):
            yield (
                self.ascent_scope == "micro" and value,
                f"`{name}` is {value!r}, which is a matter of the whole update batch: set `ascent_scope` to `update`.",
            )
        for name, needed in (("direction", "arc"), ("gradient_scale", "last"), ("ascent_fraction", 1.0)):
            yield (
                stale and getattr(self, name) != needed,
                f"`{name}` is {getattr(self, name)!r}, but stale ascent has a single pass: set it to {needed!r}, or choose another "
                "`perturbation`.",
            )
        yield (
            sloping and self.ascent_fraction < 1,
            f"`gradient_scale` is {self.gradient_scale!r}, which compares losses of one batch: set `ascent_fraction` to 1.",
        )

    @property
    def alphas(self) -> list[float]:
        """The grid of the search: `alpha_samples` points from 0 to `alpha_max`, both included."""
        return [self.alpha_max * i / (self.alpha_samples - 1) for i in range(self.alpha_samples)]

    @property
    def radius(self) -> float:
        """ρ_max, in the 2-norm of all trainable weights."""
        return 2 * self.rho if self.rho_max is None else self.rho_max

    @property
    def searches(self) -> bool:
        """Whether α is searched (XSAM), and not fixed or without a meaning."""
        return self.direction == "arc" and self.alpha is None

    @classmethod
    def of(cls, arguments: Any) -> XSAMArguments:
        """
        The method's fields of an arguments object, checked anew; the defaults if it is no [`XSAMArguments`].

        Another object's field of the same name, such as a distillation's `alpha`, is not the method's.
        """
        if not isinstance(arguments, XSAMArguments):
            return cls()
        return cls(**{f.name: getattr(arguments, f.name) for f in fields(XSAMArguments)})


def _is_number(value: Any) -> bool:
    # `alpha=False` would be 0, the direction of the plain gradient.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False


def _written(kind: Any) -> str:
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


@cache
def _choices() -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(XSAMArguments)
    return {name: get_args(kind) for name, kind in hints.items() if get_origin(kind) is Literal}
