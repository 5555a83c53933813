"""One of the Trainer's passes, kept so that it can be run again, on all of its examples or on some."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..pass_state import PassState


@dataclass
class MicroBatch:
    """
    All that is needed to run one of the Trainer's passes again.

    Args:
        kept (`Any`): the inputs as the first pass got them, on its device, for no pass to write into.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): what the Trainer divides the loss by.
        accumulation_steps (`int`): micro-batches in this update.
        before ([`PassState`]): what the first pass started from.
        broadcasts (`bool`, *optional*): whether DDP sent process 0's buffers to the others at its beginning.
        subset (`torch.Tensor`, *optional*): the examples that the ascent's gradients are made from; all of them by default.
        size (`int`): how many there are, where a subset is made.
        loss (`torch.Tensor`): what the first pass returned.
    """

    kept: Any
    num_items_in_batch: Tensor | int | None
    accumulation_steps: int
    before: PassState
    broadcasts: bool | None = None
    subset: Tensor | None = None
    size: int = 1
    loss: Tensor = torch.empty(0)

    @property
    def share(self) -> float:
        """How many of all examples the ascent's gradients are made from."""
        return 1.0 if self.subset is None else len(self.subset) / self.size

    def inputs(self, whole: bool) -> tuple[Any, Tensor | int | None]:
        """
        A copy of the inputs, and the number of items: of the whole batch, or of the subset.

        A subset's loss estimates that of the whole: it is divided by its share of the items.
        """
        inputs, n = copy_of((self.kept, self.num_items_in_batch))
        if whole or self.subset is None:
            return inputs, n
        return _cut(inputs, self.subset, self.size), n if n is None else n * self.share


def copy_of(data: Any) -> Any:
    """
    A copy down to every tensor and every object, so that a pass may write into what it gets.

    Raises:
        `NotImplementedError`: something in it cannot be copied, so that later passes could not get what the first one got.
    """
    try:
        return copy.deepcopy(data, _copies(list(_tensors(data))))
    except Exception as error:
        raise NotImplementedError(
            f"The batch holds something that cannot be copied for the later passes of an update ({error}): give the model tensors "
            "and plain Python objects, or set `rho` to 0."
        ) from error


def _copies(tensors: Sequence[Tensor]) -> dict[int, Any]:
    """
    Copies by the tensors' `id`, where `deepcopy` would not do; it refuses a tensor with a history, and rightly so.

    A tensor that is a part of a larger memory is copied without the rest. Parts that make up a memory together keep sharing it:
    what is written into one is seen in the others. A weight in the batch stays the weight, which moves and takes a gradient.
    """
    copies: dict[int, Any] = {}
    together: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        if tensor.layout == torch.strided:
            together[tensor.untyped_storage().data_ptr()][id(tensor)] = tensor
        elif tensor.is_leaf:  # sparse, nested
            copies[id(tensor)] = tensor.clone()
    for parts in together.values():
        whole = sum(part.nbytes for part in parts.values())
        for key, part in parts.items():
            if isinstance(part, nn.Parameter):
                copies[key] = part
            elif part.is_leaf and (len(parts) == 1 or part.untyped_storage().nbytes() > whole):
                copies[key] = part.detach().clone().requires_grad_(part.requires_grad)
    return copies


def random_subset(
    inputs: Any, fraction: float, key: Sequence[int], label_names: Sequence[str] = ("labels",)
) -> tuple[Tensor | None, int]:
    """
    A random part of a batch's examples, rounded up to whole ones.

    Args:
        inputs (`Any`): the batch.
        fraction (`float`): above 0, up to 1.
        key (`Sequence[int]`): the choice is a function of it, and of no random stream.
        label_names (`Sequence[str]`, *optional*): which inputs are the labels, whose first dimension is the batch's.

    Returns:
        `tuple[torch.Tensor, int]`: the chosen examples in ascending order, `None` for all of them, and how many there are.

    Raises:
        `ValueError`: the tensors do not tell how many examples there are.

    Source of the idea: the ascent needs fewer examples than the descent (Foret et al. 2021, m-sharpness; Du et al. 2022,
    ESAM, arXiv:2110.03141; Ni et al. 2022, K-SAM, arXiv:2210.12864, choose those of the highest loss instead).
    """
    size = _examples(inputs, label_names)
    count = max(1, math.ceil(fraction * size - 1e-9))  # 0.14 · 50 is 7.000000000000001
    if count == size:
        return None, size
    batch = next(tensor for tensor in _tensors(inputs) if tensor.ndim > 0 and len(tensor) == size)
    chosen = np.sort(np.random.default_rng(list(key)).choice(size, count, replace=False))
    subset = torch.from_numpy(chosen)
    if batch.is_cuda:
        subset = subset.pin_memory()  # or the copy would wait for the device
    return subset.to(batch.device, non_blocking=True), size


def _examples(inputs: Any, label_names: Sequence[str]) -> int:
    """The labels' first dimension; without labels that of all tensors, but for those of one number for the whole batch."""
    named = (
        {name: value for name, value in inputs.items() if name in label_names} if isinstance(inputs, Mapping) else {}
    )
    others = {name: value for name, value in inputs.items() if name not in named} if named else inputs
    of_labels, of_others = ({len(tensor) for tensor in _tensors(data) if tensor.ndim > 0} for data in (named, others))
    sizes = of_labels or of_others - {1} or {1}
    if len(sizes) > 1 or (of_labels and of_others and of_labels.isdisjoint(of_others)):
        raise ValueError(
            f"`ascent_fraction` takes a part of the batch's examples, and how many there are is not clear: the first dimensions of its "
            f"labels are {sorted(of_labels) or 'unknown'}, those of its other tensors {sorted(of_others)}. Name the labels "
            "(`label_names`), one for each example, or set `ascent_fraction` to 1."
        )
    return sizes.pop()


def _cut(inputs: Any, subset: Tensor, size: int) -> Any:
    """The examples of the subset, of every tensor whose first dimension is the batch's; whatever else there is stays."""

    def of(tensor: Tensor) -> Tensor:
        return tensor[subset.to(tensor.device)] if tensor.ndim > 0 and len(tensor) == size else tensor

    return recursively_apply(of, inputs)


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _tensors(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _tensors(value)
