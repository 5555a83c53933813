"""The method's hyperparameters: one plain dataclass, each field declared and checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from .ascent import ASCENTS
from .direction import DIRECTIONS, SCALES
from .rounding import DTYPES


_CHOICES: dict[str, tuple[str, ...]] = {
    "perturbation": ASCENTS,
    "direction": DIRECTIONS,
    "gradient_scale": SCALES,
    "alpha_search": ("grid", "golden"),
    "ascent_scope": ("update", "micro"),
    "asam_scope": ("weights", "all"),
    "perturbation_dtype": DTYPES,
    "sharpness_between": ("plain", "reuse"),
}
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
]


@dataclass
class XSAMArguments:
    """
    The method's hyperparameters, each of them also a field of [`XSAMTrainingArguments`] and a command-line flag.

    Args:
        rho (`float`, *optional*, defaults to 0.05):
            Total ascent length, in the 2-norm of all trainable weights; each of the k steps is `rho / ascent_steps` long.
            0 switches everything off: the plain optimizer, one pass. Denoted ρ in the paper.
        ascent_steps (`int`, *optional*, defaults to 1):
            Number of ascent steps. An update costs `ascent_steps + 1` passes. Denoted k in the paper.
        perturbation (`str`, *optional*, defaults to `"sam"`):
            Where to climb: `"sam"`, `"asam"`, `"vasso"` or `"fsam"`; see `ascent.py`.
        direction (`str`, *optional*, defaults to `"arc"`):
            Where to descend: `"arc"` (XSAM; SAM with `alpha=1`), or a sum of the gradients along the ascent, `"lsam"`,
            `"lsam+"`, `"msam"` or `"msam+"`; see `direction.py`.
        alpha (`float`, *optional*):
            Position on the arc. Not given: searched (XSAM). 1: SAM. Another fixed value: WSAM-like. Denoted α.
        rho_max (`float`, *optional*, defaults to `2 * rho`):
            Radius of the search for α, in the same norm as `rho`. Denoted ρ_max.
        alpha_max (`float`, *optional*, defaults to 2.0):
            End of the search's grid, which starts at 0.
        alpha_samples (`int`, *optional*, defaults to 21):
            Points of the grid, both ends included. One forward pass each.
        alpha_search_steps (`float`, *optional*):
            How often α is searched. Not given: at the first update of every epoch. A whole number: every so many updates.
            Below 1: that share of all updates, as for `eval_steps`.
        alpha_search (`str`, *optional*, defaults to `"grid"`):
            `"grid"`: a forward pass at every point. `"golden"`: about 9 of 21, the same α where the curve has one peak; where
            it shows several, the whole grid. Only a whole grid is told from noise.
        alpha_smoothing (`bool`, *optional*, defaults to `False`):
            Take the maximum of parabolas fitted around each point, for losses that are noisy in bfloat16.
        search_offload (`bool`, *optional*, defaults to `False`):
            Keep the weights' copy on the CPU during a search, which every probe then reads again: one extra
            parameter-sized buffer on the device instead of two.
        gradient_scale (`str`, *optional*, defaults to `"last"`):
            Norm of the update's gradient: `"last"` ‖g_k‖, `"first"` ‖g_0‖, `"mean"` or `"max"` of ‖g_0‖ ... ‖g_k‖, `"slope"`
            from θ_0 to θ_k, or `"slope_max"` from θ_0 to θ_0 + ρ_max v (one more forward pass each update).
        ascent_scope (`str`, *optional*, defaults to `"update"`):
            `"update"`: one ascent for the whole update batch, over micro-batches and processes. `"micro"`: each
            micro-batch of each process climbs on its own (m-sharpness).
        ascent_fraction (`float`, *optional*, defaults to 1.0):
            Share of the update batch, drawn at random, that the ascent's gradients are made from: an update then costs
            1 + `ascent_fraction` passes for `ascent_steps=1`.
        perturbation_dtype (`str`, *optional*, defaults to `"weights"`):
            For weights in half precision, in which most of a small step is lost in rounding. `"weights"`: rounded to the
            nearest. `"stochastic"`: at random, so that on average nothing is lost. `"float32"`: the ascent steps are added
            up in float32 beside the weights (one more buffer, of 4 bytes a weight) and their sum is rounded; v_0 of the arc is
            then exact, while `"stochastic"` adds noise to it.
        rho_exclude (`list[str]`, *optional*):
            Regular expressions; weights in whose name one of them is found are never perturbed, but still trained.
        sharpness_start, sharpness_end (`float`, *optional*, default to 0 and 1):
            XSAM is on from this share of all updates to that one, and the plain optimizer before and after.
        sharpness_every (`int`, *optional*, defaults to 1):
            XSAM is on in every n-th update between them.
        sharpness_between (`str`, *optional*, defaults to `"plain"`):
            The updates between those: `"plain"` gradients, or `"reuse"` to turn them as the last XSAM update was turned. Averages
            of `vasso` and `fsam` move in XSAM updates only.
        asam_eta (`float`, *optional*, defaults to 0.01):
            What ASAM adds to a weight's size. Denoted η.
        asam_scope (`str`, *optional*, defaults to `"weights"`):
            What ASAM scales: `"weights"` of two dimensions or more, as the authors do, or `"all"`, biases and norms too.
        vasso_decay (`float`, *optional*, defaults to 0.4):
            Share of the new gradient in VaSSO's running average. Denoted φ; 1 is SAM.
        fsam_sigma (`float`, *optional*, defaults to 1.0):
            How much of its running average FSAM takes off the gradient. Denoted σ; 0 is SAM.
        fsam_lambda (`float`, *optional*, defaults to 0.9):
            Share of the past in FSAM's running average. Denoted λ.

    Raises:
        `ValueError`: a value is out of range or unknown; the message names the field, the value and the way out.
    """

    rho: float = field(
        default=0.05,
        metadata={"help": "Total ascent length in the 2-norm of all trainable weights. 0: plain optimizer, one pass."},
    )
    ascent_steps: int = field(default=1, metadata={"help": "Number k of ascent steps, each rho / k long."})
    perturbation: str = field(default="sam", metadata={"help": f"Where to climb: {', '.join(ASCENTS)}."})
    direction: str = field(default="arc", metadata={"help": f"Where to descend: {', '.join(DIRECTIONS)}."})
    alpha: float | None = field(
        default=None, metadata={"help": "Position on the arc. Not given: searched (XSAM). 1: SAM. Other: WSAM-like."}
    )
    rho_max: float | None = field(default=None, metadata={"help": "Radius of the search for alpha. Default: 2 * rho."})
    alpha_max: float = field(default=2.0, metadata={"help": "End of the grid of the search, which starts at 0."})
    alpha_samples: int = field(default=21, metadata={"help": "Points of the grid, both ends included."})
    alpha_search_steps: float | None = field(
        default=None,
        metadata={
            "help": "How often alpha is searched. Not given: first update of every epoch. n: every n updates. "
            "Below 1: share of training."
        },
    )
    alpha_search: str = field(
        default="grid",
        metadata={"help": "grid: every point. golden: about 9 of 21, the same alpha where the curve has one peak."},
    )
    alpha_smoothing: bool = field(
        default=False, metadata={"help": "Search on parabolas fitted around each point, for losses noisy in bfloat16."}
    )
    search_offload: bool = field(
        default=False, metadata={"help": "Keep the copy of the weights on the CPU during a search: one buffer less."}
    )
    gradient_scale: str = field(
        default="last", metadata={"help": f"Norm of the update's gradient: {', '.join(SCALES)}."}
    )
    ascent_scope: str = field(
        default="update",
        metadata={"help": "update: one ascent for the whole update batch. micro: each micro-batch its own."},
    )
    ascent_fraction: float = field(
        default=1.0, metadata={"help": "Random share of the update batch that the ascent's gradients are made from."}
    )
    perturbation_dtype: str = field(
        default="weights",
        metadata={
            "help": "Weights in half precision: weights (round to nearest), stochastic (at random), float32 (add steps up)."
        },
    )
    rho_exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions: weights whose name has a match are trained, but never perturbed."},
    )
    sharpness_start: float = field(
        default=0.0, metadata={"help": "Share of training after which XSAM is on; the plain optimizer before."}
    )
    sharpness_end: float = field(
        default=1.0, metadata={"help": "Share of training at which XSAM goes off; the plain optimizer after."}
    )
    sharpness_every: int = field(default=1, metadata={"help": "XSAM in every n-th update only."})
    sharpness_between: str = field(
        default="plain",
        metadata={"help": "The updates between: plain, or reuse to turn their gradient as the last XSAM update's."},
    )
    asam_eta: float = field(default=0.01, metadata={"help": "ASAM: what is added to a weight's size."})
    asam_scope: str = field(
        default="weights",
        metadata={"help": "ASAM: scale weights of two dimensions or more, or all (biases and norms too)."},
    )
    vasso_decay: float = field(
        default=0.4, metadata={"help": "VaSSO: share of the new gradient in the average. 1: SAM."}
    )
    fsam_sigma: float = field(default=1.0, metadata={"help": "FSAM: how much of the average is taken off. 0: SAM."})
    fsam_lambda: float = field(default=0.9, metadata={"help": "FSAM: share of the past in the average."})

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        for name, allowed, way_out in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int | float) or not (math.isfinite(value) and allowed(value)):
                raise ValueError(f"`{name}` is {value!r}: give {way_out}.")
        for name in ("alpha_smoothing", "search_offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: give true or false.")
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
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= self.alpha_max):
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
        # `class X(XSAMArguments, TrainingArguments)` is one cooperative chain.
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def _combinations(self):
        """Fields that contradict each other, and the way out."""
        averaging = self.perturbation in ("vasso", "fsam")
        sloping = self.gradient_scale.startswith("slope")
        reusing = self.sharpness_between == "reuse"
        yield (
            self.direction != "arc" and self.alpha is not None,
            f"`alpha` is {self.alpha}, but `direction` {self.direction!r} has no arc: leave `alpha` out, or choose `arc`.",
        )
        yield (
            averaging and self.ascent_steps > 1,
            f"`ascent_steps` is {self.ascent_steps}, but {self.perturbation} is defined for a single step from the average of "
            "first gradients: set it to 1, or choose the perturbation `sam` or `asam`.",
        )
        for name, value in (
            ("perturbation", averaging and self.perturbation),
            ("gradient_scale", sloping and self.gradient_scale),
            ("sharpness_between", reusing and "reuse"),
        ):
            yield (
                self.ascent_scope == "micro" and value,
                f"`{name}` is {value!r}, which is a matter of the whole update batch: set `ascent_scope` to `update`.",
            )
        yield (
            sloping and self.ascent_fraction < 1,
            f"`gradient_scale` is {self.gradient_scale!r}, which compares losses of one batch: set `ascent_fraction` to 1.",
        )
        yield (
            reusing and self.direction != "arc",
            f"`sharpness_between` is 'reuse', but `direction` {self.direction!r} has no arc: choose `arc`, or `plain`.",
        )

    @property
    def alphas(self) -> list[float]:
        """The grid of the search: `alpha_samples` points from 0 to `alpha_max`, both included."""
        return [self.alpha_max * i / (self.alpha_samples - 1) for i in range(self.alpha_samples)]

    @classmethod
    def of(cls, arguments: Any) -> XSAMArguments:
        """The method's fields of any arguments object, checked anew; the defaults for those that it does not have."""
        values: dict[str, Any] = {f.name: getattr(arguments, f.name, f.default) for f in fields(XSAMArguments)}
        return cls(**values)
