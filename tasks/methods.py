"""The methods of the paper's tables by name: each stands for some of the trainer's flags and nothing else."""

import shlex
from typing import Any


# Sums of gradients are SAM for one ascent step, so they get two. ASAM's rho is a share of the weights' size: about ten times
# SAM's in the paper that introduced it. The fixed alpha of wsam is to be tuned.
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"rho": 0.0},
    "sam": {"alpha": 1.0},
    "wsam": {"alpha": 1.5},
    "asam": {"perturbation": "asam", "alpha": 1.0},
    "vasso": {"perturbation": "vasso", "alpha": 1.0},
    "fsam": {"perturbation": "fsam", "alpha": 1.0},
    "lsam": {"direction": "lsam", "ascent_steps": 2},
    "lsam+": {"direction": "lsam+", "ascent_steps": 2},
    "msam": {"direction": "msam", "ascent_steps": 2},
    "msam+": {"direction": "msam+", "ascent_steps": 2},
    "stale-sam": {"perturbation": "stale", "alpha": 1.0},
    "stale-xsam": {"perturbation": "stale"},
    "xsam": {},
    "xsam-tenth": {"ascent_fraction": 0.1},
    "xsam+asam": {"perturbation": "asam"},
}


def flags(name: Any) -> str:
    """
    A method as it is written on the command line.

    Raises:
        `ValueError`: there is no such method.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"`method` is {name!r}: choose one of {', '.join(METHODS)}.")
    return shlex.join(f"--{field}={value}" for field, value in METHODS[name].items())


def name_of(args: Any) -> str:
    """The method that some arguments stand for: one of `METHODS`, or the base optimizer's name where XSAM is off."""
    if args.rho == 0:
        return args.optim.value.split("_")[0]
    name = args.direction if args.direction != "arc" else {None: "xsam", 1.0: "sam"}.get(args.alpha, "wsam")
    if args.perturbation == "sam":
        return "xsam-tenth" if name == "xsam" and args.ascent_fraction == 0.1 else name
    if args.perturbation == "stale":
        return f"stale-{name}"
    return args.perturbation if name == "sam" else f"{name}+{args.perturbation}"


def is_method(name: str, args: Any) -> bool:
    """Whether some arguments still are the method of that name, whatever else they tune."""
    return args.rho == 0 if name == "sgd" else name_of(args) in (name, f"{name}-tenth")
