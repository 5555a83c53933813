"""One of the Trainer's passes, kept so that it can be run again, on all of its examples or on some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from .perturbation import RandomState


@dataclass
class MicroBatch:
    """
    All that is needed to run one of the Trainer's passes again.

    Args:
        inputs (`dict`): as the Trainer got them.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): what the Trainer divides the loss by.
        accumulation_steps (`int`): micro-batches in this update.
        random_state ([`RandomState`]): before the pass.
        part (`dict`): the inputs of the examples that the ascent's gradients are made from; all of them by default.
        share (`float`): how many of all examples these are.
        loss (`torch.Tensor`): what the first pass returned.
    """

    inputs: dict[str, Any]
    num_items_in_batch: Tensor | int | None
    accumulation_steps: int
    random_state: RandomState
    part: dict[str, Any]
    share: float
    loss: Tensor

    def of_part(self) -> tuple[dict[str, Any], Any]:
        """The part's inputs, and its share of the items: its loss estimates that of the whole."""
        n = self.num_items_in_batch
        return self.part, n if n is None or self.share == 1 else n * self.share


def random_part(inputs: dict[str, Any], fraction: float, key: Sequence[int]) -> tuple[dict[str, Any], float]:
    """
    A random part of a batch's examples, rounded up to whole ones, and how large it is.

    Args:
        inputs (`dict`): tensors whose first dimension is the batch's are cut; whatever else there is stays.
        fraction (`float`): above 0, up to 1.
        key (`Sequence[int]`): the choice is a function of it, and of no random stream.

    Returns:
        `tuple[dict, float]`: the inputs of the part, and its share of the examples.

    Source of the idea: the ascent needs fewer examples than the descent (Foret et al. 2021, m-sharpness; Du et al. 2022,
    ESAM, arXiv:2110.03141; Ni et al. 2022, K-SAM, arXiv:2210.12864, choose those of the highest loss instead).
    """
    size = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim > 0), 1)
    count = max(1, math.ceil(fraction * size - 1e-9))  # 0.14 · 50 is 7.000000000000001
    if count == size:
        return inputs, 1.0
    chosen = torch.from_numpy(np.sort(np.random.default_rng(list(key)).choice(size, count, replace=False)))

    def cut(tensor: Tensor) -> Tensor:
        return tensor[chosen.to(tensor.device)] if tensor.ndim > 0 and len(tensor) == size else tensor

    part = {name: recursively_apply(cut, value) if isinstance(value, Tensor | Mapping | list | tuple) else value
            for name, value in inputs.items()}  # fmt: skip
    return part, count / size
