"""In which updates XSAM is on, and in which α is searched: functions of the update's number alone, so resume is exact."""

from __future__ import annotations

import math

from .arguments import XSAMArguments
from .state import XSAMState


def follow_schedule(arguments: XSAMArguments, state: XSAMState) -> bool:
    """
    Whether the coming update of a bare loop, which counts its own, ascends; asks for a search if one is due.

    Raises:
        `ValueError`: a schedule is a share of a whole that is not known, or a field is for the Trainer, which cuts batches.
    """
    if arguments.rho > 0 and (arguments.ascent_fraction < 1 or arguments.ascent_scope == "micro"):
        name = "ascent_fraction" if arguments.ascent_fraction < 1 else "ascent_scope"
        raise ValueError(
            f"`{name}` is {getattr(arguments, name)!r}, and a loop of your own cuts its batches itself: leave it out and take a part of "
            "the batch in `gradient`, or use XSAMTrainer."
        )
    state.search_due |= arguments.searches and search_at(arguments, state.updates)
    return arguments.rho > 0 and ascends_at(arguments, state.updates)


def ascends_at(arguments: XSAMArguments, update: int, updates: int | None = None) -> bool:
    """
    Whether XSAM is on in an update, or the plain optimizer: from `sharpness_start` to `sharpness_end`, every n-th.

    Sources: SAM late in training, Zhou et al. 2025 (arXiv:2410.10373); now and then, Liu et al. 2022 (LookSAM,
    arXiv:2203.02714). AE-SAM (Jiang et al. 2023, arXiv:2304.14647) decides by the gradient's size instead.

    Args:
        arguments ([`XSAMArguments`]): the method's hyperparameters.
        update (`int`): number of updates made before.
        updates (`int`, *optional*): all that there will be.

    Raises:
        `ValueError`: the schedule is a share of a whole that is not known.
    """
    first, end = _range(arguments, updates)
    return first <= update < end and (update - first) % arguments.sharpness_every == 0


def refuse_never_on(arguments: XSAMArguments, updates: int) -> None:
    """
    Refuses a schedule by which XSAM is on in no update.

    Raises:
        `ValueError`: so it is.
    """
    first, end = _range(arguments, updates)
    if first >= min(end, updates):
        raise ValueError(
            f"`sharpness_start` is {arguments.sharpness_start} and `sharpness_end` {arguments.sharpness_end}, and of {updates} updates none "
            "lies between them, so that XSAM would never be on: train longer, or give a wider range."
        )


def _range(arguments: XSAMArguments, updates: int | None) -> tuple[float, float]:
    """The first update in which XSAM may be on, and the first in which it no longer is."""
    if (arguments.sharpness_start, arguments.sharpness_end) == (0, 1):
        return 0.0, math.inf
    share = ("sharpness_start", arguments.sharpness_start)
    if arguments.sharpness_start == 0:
        share = ("sharpness_end", arguments.sharpness_end)
    whole = _known(updates, *share)
    return _share_of(arguments.sharpness_start, whole), _share_of(arguments.sharpness_end, whole)


def search_at(arguments: XSAMArguments, update: int, updates: int | None = None) -> bool:
    """
    Whether `alpha_search_steps` asks for a search before an update; searches by epoch are asked for by the epoch's loop.

    Args and raises: as [`ascends_at`].
    """
    every = arguments.alpha_search_steps
    if every is None:
        return False
    if every < 1:
        every = max(1, _share_of(every, _known(updates, "alpha_search_steps", every)))
    return update % every == 0


def _share_of(share: float, whole: int) -> int:
    """A share of all updates, rounded up; not by what floating point adds to a whole number (0.07 · 100 = 7.000000000000001)."""
    return math.ceil(share * whole - 1e-9)


def _known(updates: int | None, name: str, value: float) -> int:
    if updates is None:
        raise ValueError(
            f"`{name}` is {value}, a share of training, but the number of updates is not known here: "
            "give a whole number of updates if the field takes one, or use XSAMTrainer."
        )
    return updates
