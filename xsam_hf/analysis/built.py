"""Whether the model that a `--trainer` of the commands has built is that of the folder that it was given."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from .checkpoint import fingerprint


logger = logging.get_logger(__name__)


def check_built(model: Trainer | nn.Module, trainer: str, checkpoint: str, earlier: dict[str, str]) -> None:
    """
    Compares a model with the safetensors files of its folder, as far as there are any.

    One that has other weights than they hold is warned of and no more: they may be an average that is kept elsewhere.

    Args:
        model ([`~transformers.Trainer`] or `torch.nn.Module`): what was built.
        trainer (`str`), checkpoint (`str`): the function and the folder that it was given, for the message.
        earlier (`dict[str, str]`): the folders by what stands for the weights that were built of them; this one is added.

    Raises:
        `ValueError`: the same weights were built of a folder that holds others.
    """
    module = model.model if isinstance(model, Trainer) else model
    assert isinstance(module, nn.Module)
    first = earlier.setdefault(fingerprint(module, ()), checkpoint)
    if first != checkpoint:
        ours, theirs = ({_digest(tensor) for _, tensor in _saved(folder)} for folder in (checkpoint, first))
        if ours - theirs and theirs - ours:  # a copy may lack some, such as tied ones
            raise ValueError(
                f"{first} and {checkpoint} hold different weights, and {trainer} built the same model of both: let it load the folder "
                "that it is given."
            )
    held = module.state_dict()
    for name, tensor in _saved(checkpoint):
        own = held.get(name)
        if not isinstance(own, Tensor) or own.shape != tensor.shape:
            continue
        if not torch.equal(own.cpu(), tensor.to(own.dtype)):
            logger.warning(
                f"{trainer} built a model whose {name!r} is not that of {checkpoint}: is it to load the folder that it is given?"
            )
            return


def _saved(checkpoint: str) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(Path(checkpoint).glob("*model*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                yield name, opened.get_tensor(name)


def _digest(tensor: Tensor) -> bytes:
    """Of the values: a copy in another dtype, under other names or in other files holds the same weights."""
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).digest()
