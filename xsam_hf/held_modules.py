"""Which modules there are: those below a module, and those that attributes and functions hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn


def modules_in(things: Iterable[Any]) -> dict[nn.Module, str]:
    """
    Modules, those below them, and those that hang on their attributes or on functions, with their names.

    Looks into lists, tuples and dictionaries, and into what a function is made of: the object of a method, the arguments of
    a `functools.partial`, the variables outside that a function reads.
    """
    found: dict[nn.Module, str] = {}
    waiting = [(thing, "") for thing in things]
    for thing, name in waiting:  # which grows
        if isinstance(thing, nn.Module) and thing not in found:
            found[thing] = name
            held: dict[str, Iterable[Any]] = {key: [value] for key, value in thing._modules.items()}
            held |= {key: items_of(value) for key, value in vars(thing).items() if key != "_modules"}
            waiting += [(inner, f"{name}.{key}".lstrip(".")) for key, inners in held.items() for inner in inners]
        elif callable(thing) and not isinstance(thing, nn.Module):
            waiting += [(inner, name) for inner in parts_of(thing)]
    return found


def parts_of(function: Any) -> list[Any]:
    """What a function is made of, other functions taken apart."""
    if isinstance(function, functools.partial):
        return [function.func, *parts_of(function.func), *function.args, *function.keywords.values()]
    if inspect.ismethod(function):
        return [function.__self__]
    if inspect.isfunction(function):
        try:
            outside = inspect.getclosurevars(function)
        except ValueError:  # a variable that has no value yet
            return []
        read = [*outside.nonlocals.values(), *outside.globals.values()]
        return [inner for value in read for inner in items_of(value) if isinstance(inner, nn.Module)]
    return []


def items_of(value: Any) -> Iterable[Any]:
    """What a list, a tuple or a dictionary holds; anything else by itself."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
