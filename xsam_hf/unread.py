"""Fields of the method that nothing reads beside the others, so that another value would train alike."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import get_args

from .arguments import Perturbation, XSAMArguments


logger = logging.getLogger(__name__)

_OF_THE_SEARCH = ("alpha_samples", "alpha_search_steps", "rho_max")


def warn_of_unread(arguments: XSAMArguments) -> None:
    """Names them in one warning, for the beginning of a training."""
    if found := unread(arguments):
        told = [
            f"{', '.join(f'`{name}` ({getattr(arguments, name)})' for name in names)} where `{field}` is {getattr(arguments, field)}"
            for field, names in found.items()
        ]
        logger.warning(f"Nothing reads {'; nor '.join(told)}: leave out what was not meant for another run.")


def unread(arguments: XSAMArguments) -> dict[str, list[str]]:
    """The fields that have another value than their default and are not read, by the field that decides so."""
    others = {*get_args(Perturbation)} - {arguments.perturbation}
    found: dict[str, list[str]] = {}
    for field in fields(XSAMArguments):
        name = field.name
        if getattr(arguments, name) == field.default or name == "rho":
            continue
        if arguments.rho == 0:
            found.setdefault("rho", []).append(name)
        elif name.split("_")[0] in others:
            found.setdefault("perturbation", []).append(name)
        elif name == "rho_max" and arguments.gradient_scale == "slope_max":
            continue
        elif arguments.direction != "arc" and name in (*_OF_THE_SEARCH, "alpha_max"):
            found.setdefault("direction", []).append(name)
        elif arguments.alpha is not None and name in _OF_THE_SEARCH:
            found.setdefault("alpha", []).append(name)
    return found
