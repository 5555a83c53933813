"""Which weights an update moves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer


Weights: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def perturbed_and_excluded(
    weights: Weights, rho_exclude: Sequence[str] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """
    The trainable weights: those that are perturbed, by name, and those that `rho_exclude` keeps where they are.

    Raises:
        `TypeError`: what is given are no weights.
        `ValueError`: none is left to perturb, a pattern is in no name, or there are no names.
    """
    if isinstance(weights, nn.Module):
        weights = dict(weights.named_parameters())
    elif isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        _refuse_weights(weights)
    elif not isinstance(weights, Mapping):
        if rho_exclude:
            raise ValueError(
                "`rho_exclude` looks for names, and plain tensors have none: give the model, or a dictionary of names and tensors."
            )
        weights = list(weights)
        for weight in weights:
            if not isinstance(weight, Tensor):
                _refuse_weights(weight)
        # A tied weight may be listed twice.
        weights = {str(i): weight for i, weight in enumerate(dict.fromkeys(weights))}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"The weights are a dictionary, in which {name!r} is a {type(weight).__name__}: give names and tensors alone, the model "
                "(or of an optimizer's group its list, `group['params']`)."
            )
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not trained:
        raise ValueError(
            "No weight requires a gradient: there is nothing to perturb. Unfreeze some of the model, and give tensors as a list: an "
            "iterator such as `model.parameters()` is empty after its first use."
        )
    patterns = rho_exclude or []
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in trained):
            raise ValueError(
                f"`rho_exclude` is {pattern!r}, which no name of a trainable weight contains: give part of a name such as "
                f"{next(iter(trained), 'classifier.bias')!r}."
            )
    excluded = {name: w for name, w in trained.items() if any(re.search(pattern, name) for pattern in patterns)}
    perturbed = {name: w for name, w in trained.items() if name not in excluded}
    if not perturbed:
        raise ValueError(
            f"`rho_exclude` is {patterns}, which leaves no weight that is not excluded: there is nothing to perturb."
        )
    return perturbed, list(excluded.values())


def _refuse_weights(given: Any) -> NoReturn:
    raise TypeError(
        f"The weights are given as {type(given).__name__}: give the model, a dictionary of names and tensors, or a list of tensors."
    )


def refuse_unfit(weights: Mapping[str, Tensor]) -> None:
    """
    Refuses weights that cannot be moved and put back one by one.

    Raises:
        `ValueError`: one is computed from others, or shares memory with another, so that its step would be added twice.
    """
    ends: list[tuple[str, int, int, str]] = []
    for name, weight in weights.items():
        if is_lazy(weight):
            continue
        if not weight.is_leaf:
            raise ValueError(
                f"{name!r} is computed from other tensors, and no weight: give those that it is computed from."
            )
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        if (
            type(part) not in (Tensor, nn.Parameter)
            or part.layout != torch.strided
            or part.is_meta
            or not part.numel()
        ):
            continue
        steps = [(stride, size) for stride, size in zip(part.stride(), part.shape, strict=True) if size > 1]
        # A view with gaps may lie between the elements of another: there only the beginning tells.
        has_gaps = sum((size - 1) * stride for stride, size in steps) >= part.numel()
        length = part.element_size() if has_gaps else part.nbytes
        ends.append((str(part.device), part.data_ptr(), part.data_ptr() + length, name))
    for (device, _, end, name), (other_device, begin, _, other) in pairwise(sorted(ends)):
        if device == other_device and begin < end:
            raise ValueError(
                f"{name!r} and {other!r} are two weights in the same memory, and each step would be added twice: tie them as one, "
                "`b.weight = a.weight` and not `b.weight.data = a.weight.data`, and list it once."
            )


def weights_of(optimizer: Any) -> Iterator[Tensor]:
    """What an optimizer steps, or the optimizers in it: accelerate's wrapper, or one that deals weights out to several."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from group["params"]
    for name, value in getattr(optimizer, "__dict__", {}).items():  # None before a training
        held = value.values() if isinstance(value, dict) and name != "state" else value
        for inner in held if isinstance(held, Iterable) and not isinstance(held, Tensor | str) else [held]:
            if isinstance(inner, Optimizer):
                yield from weights_of(inner)
