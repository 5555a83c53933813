"""Which weights the Trainer's forward pass takes in half precision, and what to say where that buries the ascent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Trainer


HALF = (torch.float16, torch.bfloat16)
SHORT = 1e-4  # of which even float32 may lose a part: it takes 6e-8 of a weight's size for none
LEAST_SHARE = 0.5
LEAST_COSINE = 0.5  # at .6 nothing of the gain was lost, and at .3 a part of it (RESULTS.md)
_AUTOCAST = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}


def taken_in_half(trainer: Trainer) -> dict[Tensor, torch.dtype]:
    """
    The trainable weights that a forward pass takes in half precision, and in which.

    Those that are kept in it; all, where FSDP2's mixed-precision policy says so; under autocast, those of two dimensions or more that
    are not an embedding's alone: what linear layers and convolutions multiply with. Autocast casts their biases too, which are few,
    and leaves embeddings and the weights of norms as they are.
    """
    model, accelerator = cast(nn.Module, trainer.model), trainer.accelerator
    trained = {weight: weight.dtype for weight in model.parameters() if weight.requires_grad}
    policy = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    everywhere = getattr(policy, "param_dtype", None)
    if everywhere is not None:
        trained = dict.fromkeys(trained, everywhere)
    elif accelerator.native_amp and accelerator.mixed_precision in _AUTOCAST:
        dtype = _AUTOCAST[accelerator.mixed_precision]
        for module in model.modules():
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                cast_here = [w for w in module.parameters(recurse=False) if w in trained and w.ndim > 1]
                trained |= dict.fromkeys(cast_here, dtype)
    return {weight: dtype for weight, dtype in trained.items() if dtype in HALF}


def taken_rounded(trainer: Trainer, rho: float) -> dict[Tensor, torch.dtype]:
    """Where a forward pass may lose an ascent: in half precision; where there is none, and `rho` is short, in float32."""
    if (half := taken_in_half(trainer)) or rho >= SHORT:
        return half
    weights = cast(nn.Module, trainer.model).parameters()
    return {weight: weight.dtype for weight in weights if weight.requires_grad and weight.dtype == torch.float32}


def warning_of(measure: Mapping[str, float], in_half: bool = True) -> str | None:
    """A sentence about an ascent that rounding loses or buries, with the ways out; `None` if it does neither."""
    share, cosine = measure["share"], measure["cosine"]
    if not in_half:
        lost = share < LEAST_SHARE or cosine < LEAST_COSINE
        return (
            f"The forward pass sees {share:.0%} of the first ascent (xsam/seen_share), at a cosine of {cosine:.2f}: the rest is lost in "
            "rounding to float32. Use a longer `rho`."
            if lost
            else None
        )
    if share < LEAST_SHARE:
        return (
            f"The forward pass sees {share:.0%} of the first ascent (xsam/seen_share): the rest is lost in rounding to half precision. "
            "Use a longer `rho`, weights in float32 (`bf16=True` may stay), or `perturbation_dtype='stochastic'`. Where float32 weights "
            "come fresh from a checkpoint in half precision, it passes as training moves them."
        )
    if cosine < LEAST_COSINE:
        return (
            f"The forward pass sees the first ascent in a move {measure['length']:.1f} times as long (xsam/seen_length), at a cosine of "
            f"{cosine:.2f}: half precision is coarse beside `rho`. Use a longer `rho`, train in float32, or move "
            "the weights of norms alone, which autocast leaves in float32 (`rho_exclude`)."
        )
    return None
