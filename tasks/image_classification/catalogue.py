"""The data sets: where each is, what its images look like, and how training varies them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Images:
    """
    One data set.

    Args:
        hub (`str`, *optional*): name on the Hugging Face hub.
        columns (`tuple[str, str]`): the image's and the label's column there.
        classes, size, patch (`int`): number of labels; edge of an image and of a ViT's patch, in pixels.
        mean, std (`tuple[float, ...]`): of each channel over the training images, for pixels from 0 to 1.
        padding (`int`): training crops an image of the same size out of one with so many pixels added on every side. 0 for
            digits, where a shift by one of eight pixels is another image.
        padding_mode (`str`): what is added.
        flip (`bool`): whether training mirrors half of the images.
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

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: (H, W, C)."""
        return self.size, self.size, self.channels


# CIFAR-100's statistics are those of Zhao et al. 2022; digits' and Fashion-MNIST's are checked by the tests.
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
}  # fmt: skip
