"""
What the models are trained on: bytes, normalised by the data set's mean and standard deviation.

Loaders and workers ship bytes, a quarter of what floats take, and the model of a run normalises them itself, on its device, before
its forward pass. So whatever calls it (training, evaluation, prediction, under DDP or torch.compile) gets them right, and nothing
is added to its weights or its config: a checkpoint is an ordinary one, which `from_pretrained` reads as a model that takes
normalised pixels, with an image processor beside it that makes them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, BitImageProcessor, ViTImageProcessor
from transformers.image_utils import PILImageResampling

from tasks.image_classification.catalogue import Images


def normalize(pixels: Tensor, images: Images) -> Tensor:
    """
    Bytes (B, C, H, W) as floats with mean 0 and standard deviation 1 over the data set; floats are normalised already.

    Raises:
        `ValueError`: they are neither.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype != torch.uint8:
        raise ValueError(f"`pixel_values` are {pixels.dtype}: give bytes (uint8), or floats that are normalised.")
    normalized = pixels.to(torch.float32).mul_(1 / 255)
    # By numbers, which need no copy to the device, and are no buffers that DDP would send around in every pass.
    for channel, (mean, std) in enumerate(zip(images.mean, images.std, strict=True)):
        normalized[:, channel].sub_(mean).div_(std)
    return normalized


def accept_bytes(model: nn.Module, images: Images) -> None:
    """Lets a model that takes normalised `pixel_values` take bytes too."""
    model.register_forward_pre_hook(partial(_normalized, images), with_kwargs=True)


def _normalized(images: Images, model: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict]:
    if inputs:
        return (normalize(inputs[0], images), *inputs[1:]), keywords
    return inputs, {**keywords, "pixel_values": normalize(keywords["pixel_values"], images)}


def processor(images: Images) -> BaseImageProcessor:
    """What makes a data set's images into `pixel_values` for a model that was read by `from_pretrained`."""
    statistics = {"image_mean": list(images.mean), "image_std": list(images.std)}
    size = {"height": images.size, "width": images.size}
    if images.resize is None:
        return ViTImageProcessor(size=size, **statistics)
    return BitImageProcessor(
        size={"shortest_edge": images.resize}, crop_size=size, resample=PILImageResampling.BILINEAR, **statistics
    )
