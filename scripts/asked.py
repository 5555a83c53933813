"""Whether a result is of what was asked for: its method, data set, model and seed, and every argument that a command line gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.run_flags import fields
from tasks.identity import IMMATERIAL
from tasks.methods import METHODS
from tasks.secret import is_secret


def asked(flags: Sequence[str], recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields that a command line gives, in the order of [`~tasks.recipes.parse`]: flags, the method that they name, the recipe's."""
    recipe, given = recipe or {}, fields(flags)
    stand_for = [METHODS.get(str(of.get("method")), {}) for of in (recipe, given)]
    return {**stand_for[0], **recipe, **stand_for[1], **given}


def recipe_of(command: Sequence[str]) -> str | None:
    """The name of the recipe in a run's command."""
    return next((Path(part).stem for part in command if part.endswith(".yaml")), None)


def check_asked(place: Any, by: str, asked: Mapping[str, Any], result: Mapping[str, Any], remedy: str) -> None:
    """
    Refuses a result of something else; what an older one does not tell is not looked at.

    Args:
        place: where it is, for the message.
        by (`str`): who asks, for the message.
        asked (`Mapping[str, Any]`): the fields.
        result (`Mapping[str, Any]`): what stands in `result.json`.
        remedy (`str`): what to do, for the message.

    Raises:
        `ValueError`: it has another value for a field that matters.
    """
    told = {name: result[name] for name in ("dataset", "model", "seed", "method") if name in result}
    told |= {name: value for name, value in result.get("arguments", {}).items() if name != "method"}
    for name, expected in asked.items():
        if name in told and name not in IMMATERIAL and not is_secret(name) and not _is(name, expected, told[name]):
            raise ValueError(
                f"{place} is a result with {name} {told[name]}, and {by} asks for {name} {expected}: {remedy}."
            )


def check_folder(place: Any, folder: Path, flags: Sequence[str], remedy: str) -> None:
    """
    Refuses a run whose command fills the folder of another method or seed; of another group it may be.

    Args:
        folder (`Path`): where it is, `NAME/seed-SEED` at the end.

    Raises:
        `ValueError`: so it is.
    """
    own = Path(fields(flags).get("output_dir", folder))
    if own.name.startswith("seed-") and own.parts[-2:] != folder.parts[-2:]:
        names = ["/".join(path.parts[-2:]) for path in (own, folder)]
        raise ValueError(f"{place} was made as {names[0]} and stands for {names[1]}: {remedy}.")


def _is(name: str, expected: Any, found: Any) -> bool:
    if name == "method":  # the base optimizer's name where XSAM is off, which `rho` tells
        return not isinstance(found, str) or expected == "sgd" or found in (expected, f"{expected}-tenth")
    if isinstance(expected, list | dict) or isinstance(found, list | dict) or str(found)[:1] in ("[", "{"):
        return True  # kept as text, in a form of Python's
    if isinstance(found, bool):
        return str(expected).lower() in (
            ("", "true", "t", "yes", "y", "1") if found else ("false", "f", "no", "n", "0")
        )
    if isinstance(found, int | float):
        try:
            return float(expected) == found
        except (TypeError, ValueError):
            return False
    return str(expected) == str(found)
