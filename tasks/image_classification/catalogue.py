"""The data sets: where each is, what its images look like, and how training varies them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Images:
    """
    One data set.

    Args:
        hub (`str`, *optional*): name on the Hugging Face hub.
        columns (`tuple[str, str]`): the image's and the label's column there.
        classes, size, patch (`int`): number of labels; edge of an image that a model gets, and of a ViT's patch, in pixels.
        mean, std (`tuple[float, ...]`): of each channel over the training images, for pixels from 0 to 1.
        padding (`int`): training crops an image of the same size out of one with so many pixels added on every side. 0 for
            digits, where a shift by one of eight pixels is another image.
        padding_mode (`str`): what is added.
        flip (`bool`): whether training mirrors half of the images.
        resize (`int`, *optional*): images that are scored are brought to so many pixels on their shorter side, and the middle of
            that is taken. Not given if they have `size` pixels.
        stored (`int`, *optional*): edge of the images as they come. Not given if it is `size`.
        on_disk (`bool`): whether the images differ in size and are too many for the memory, so that each is read when it is asked for.
        crop_share (`tuple[float, float]`, *optional*): training takes rectangles of such a share of an image instead of padding it.
        test_split (`str`): what the hub calls it.
    """

    hub: str | None
    columns: tuple[str, str]
    classes: int
    size: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    padding_mode: str
    flip: bool
    resize: int | None = None
    stored: int | None = None
    on_disk: bool = False
    crop_share: tuple[float, float] | None = None
    test_split: str = "test"

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def edge(self) -> int:
        """Of one image as it comes, in pixels."""
        return self.size if self.stored is None else self.stored

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as it comes: (H, W, C)."""
        return self.edge, self.edge, self.channels


# CIFAR-100's statistics are those of Zhao et al. 2022; digits' and Fashion-MNIST's are checked by the tests. Tiny-ImageNet's, and that its
# 64 pixels become 32, with crops of 80 to 100 %, are the paper's code's (github.com/Cccjl219/XSAM, utils/dataset.py); ImageNet's are
# torchvision's.
DATASETS = {
    "digits": Images(None, ("", ""), 10, 8, 2, (0.3051,), (0.3757,), 0, "constant", False),
    "fashion_mnist": Images(
        "zalando-datasets/fashion_mnist", ("image", "label"), 10, 28, 7, (0.2860,), (0.3530,), 2, "constant", True
    ),
    "cifar10": Images(
        "uoft-cs/cifar10", ("img", "label"), 10, 32, 4,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, "reflect", True,
    ),
    "cifar100": Images(
        "uoft-cs/cifar100", ("img", "fine_label"), 100, 32, 4,
        (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047), 4, "reflect", True,
    ),
    "tiny_imagenet": Images(
        "zh-plus/tiny-imagenet", ("image", "label"), 200, 32, 4,
        (0.4803, 0.4481, 0.3975), (0.2541, 0.2456, 0.2604), 0, "constant", True,
        resize=36, stored=64, crop_share=(0.8, 1.0), test_split="valid",
    ),
    "imagenet": Images(
        "ILSVRC/imagenet-1k", ("image", "label"), 1000, 224, 16,
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0, "constant", True,
        resize=256, on_disk=True, crop_share=(0.08, 1.0), test_split="validation",
    ),
}  # fmt: skip
