"""Random crops, flips and blank rectangles: a batch at a time, and the same for an image whatever batch it is in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from tasks.image_classification.catalogue import Images


TRIES = 10  # for a rectangle that fits, as torchvision has them
CROP_RATIO = (3 / 4, 4 / 3)  # width to height; torchvision's defaults, and so is all of the next line
ERASED_SHARE, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)


@dataclass(frozen=True)
class Augmentation:
    """
    How training varies the images of a data set.

    Args:
        images ([`Images`]): says how they are cropped and flipped.
        cutout (`int`, *optional*, defaults to 0): edge in pixels of a square that is blanked out with the data set's mean, as in
            DeVries & Taylor 2017 (arXiv:1708.04552): its centre is any pixel, and what sticks out of the image is lost.
        cutout_probability (`float`, *optional*, defaults to 1.0): share of the images that it happens to.
        random_erasing (`float`, *optional*, defaults to 0.0): share of the images in which a rectangle of 2 to 33 % of the area is
            blanked out, as by torchvision's `RandomErasing` (Zhong et al. 2020, arXiv:1708.04896).
        padding_mode (`str`, *optional*): `constant` (black) or `reflect`, if not the data set's.
    """

    images: Images
    cutout: int = 0
    cutout_probability: float = 1.0
    random_erasing: float = 0.0
    padding_mode: str | None = None

    @property
    def is_none(self) -> bool:
        """Whether it leaves all images as they are."""
        crops = self.images.padding or self.images.crop_share
        return not (crops or self.images.flip or self.cutout or self.random_erasing)

    def draw(self, seed: int, epoch: int, n: int) -> np.ndarray:
        """
        What happens to each of `n` images in an epoch, (n, 9): the crop's row, column, height and width; flipped or not; the blank
        rectangle's first row and column and those behind its last. A row depends on seed, epoch and its index alone.
        """
        chances = iter(np.random.default_rng([seed, epoch]).random((n, 7 + 4 * TRIES)).T)
        return np.column_stack(
            [*self._crop(chances), _below(2 if self.images.flip else 1, next(chances)), *self._blank(chances)]
        )

    def _crop(self, chances):
        edge = self.images.edge
        if self.images.crop_share is None:
            places = 2 * self.images.padding + 1
            size = np.full_like(first := _below(places, next(chances)), self.images.size)
            return first, _below(places, next(chances)), size, size
        width, height, found = _rectangle(chances, edge**2, self.images.crop_share, CROP_RATIO, edge + 1)
        width, height = np.where(found, width, edge), np.where(found, height, edge)
        return _below(edge - height + 1, next(chances)), _below(edge - width + 1, next(chances)), height, width

    def _blank(self, chances):
        size = self.images.size
        happens, row, column = next(chances), next(chances), next(chances)
        if self.cutout:
            half = self.cutout // 2
            first = [np.where(happens < self.cutout_probability, _below(size, c) - half, -size) for c in (row, column)]
            edges = self.cutout, self.cutout
        elif not self.random_erasing:
            return [np.zeros_like(happens, dtype=np.int64)] * 4
        else:
            height, width, found = _rectangle(chances, size**2, ERASED_SHARE, ERASED_RATIO, size)
            edges = height, width
            happens = found & (happens < self.random_erasing)
            first = [
                np.where(happens, _below(size - e + 1, c), -size) for e, c in zip(edges, (row, column), strict=True)
            ]
        return (*first, first[0] + edges[0], first[1] + edges[1])

    def pad(self, pixels: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) with the data set's padding."""
        edge = (self.images.padding, self.images.padding)
        mode = self.images.padding_mode if self.padding_mode is None else self.padding_mode
        # The type checker of numpy knows the modes by their names only.
        return np.pad(pixels, ((0, 0), (0, 0), edge, edge), mode=mode)  # type: ignore[call-overload]

    def __call__(self, padded: np.ndarray, index: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """
        A batch of varied images.

        Args:
            padded (`np.ndarray`): all images, as [`pad`] returns them: bytes.
            index (`np.ndarray`): (B,), which of them.
            draws (`np.ndarray`): (N, 9), of all images, as [`draw`] returns them.

        Returns:
            `np.ndarray`: (B, C, H, W), bytes of its own.
        """
        size = self.images.size
        top, left, height, width, flipped, *rectangle = draws[index].T
        if self.images.crop_share is None:
            batch = sliding_window_view(padded, (size, size), axis=(2, 3))[index, :, top, left]
        else:
            batch = resized(padded[index], (top, left, height, width), size)
        mirrored = flipped == 1
        batch[mirrored] = batch[mirrored][..., ::-1]
        if self.cutout or self.random_erasing:
            place, (first_row, first_column, row_behind, column_behind) = (
                np.arange(size),
                np.array(rectangle)[..., None],
            )
            rows = (first_row <= place) & (place < row_behind)
            columns = (first_column <= place) & (place < column_behind)
            level = np.round(255 * np.array(self.images.mean)).astype(np.uint8)
            batch = np.where((rows[:, :, None] & columns[:, None, :])[:, None], level[:, None, None], batch)
        return batch


def _below(counts, chance: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to below some counts, of numbers from 0 to below 1."""
    return (chance * counts).astype(np.int64)


def _rectangle(chances, area: int, share, ratio, limit: int):
    """
    The first of some rectangles that fits, as torchvision's `get_params` look for it.

    Args:
        chances: an iterator over (n,) numbers from 0 to 1, of which `2 * TRIES` are taken.
        area (`int`): of the image, in pixels.
        share, ratio (`tuple[float, float]`): of the area, equally likely; of the edges, equally likely as logarithms.
        limit (`int`): that the edges are to be below.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: the first edge, which is `ratio` times the second; the second; whether one fits.
    """
    tries = np.array([next(chances) for _ in range(2 * TRIES)]).reshape(2, TRIES, -1)
    areas = area * (share[0] + (share[1] - share[0]) * tries[0])
    ratios = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * tries[1])
    edges = np.rint(np.sqrt([areas * ratios, areas / ratios])).astype(np.int64)
    fits = ((edges > 0) & (edges < limit)).all(axis=0)
    first = fits.argmax(axis=0)
    one, other = edges[:, first, np.arange(len(first))]
    return one, other, fits.any(axis=0)


def resized(pixels: np.ndarray, box: tuple[np.ndarray, ...], size: int) -> np.ndarray:
    """
    A rectangle of each image at another size, bilinear and antialiased as Pillow and torchvision make it, within a level.

    Args:
        pixels (`np.ndarray`): (B, C, H, W), bytes.
        box (`tuple[np.ndarray, ...]`): row, column, height and width of the rectangles, each (B,).
        size (`int`): edge of what is returned.

    Returns:
        `np.ndarray`: (B, C, size, size), bytes.
    """
    top, left, height, width = box
    rows, columns = (
        torch.from_numpy(_bilinear(start, length, edge, size))[:, None]
        for start, length, edge in ((top, height, pixels.shape[2]), (left, width, pixels.shape[3]))
    )
    levels = rows @ torch.from_numpy(pixels).float() @ columns.mT
    return levels.round_().clamp_(0, 255).to(torch.uint8).numpy()


def _bilinear(start: np.ndarray, length: np.ndarray, edge: int, size: int) -> np.ndarray:
    """How much each of `edge` pixels of a line counts in each of `size` new ones, (B, size, edge); those outside do not."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    centre = start + (np.arange(size)[:, None] + 0.5) * scale
    place = np.arange(edge) + 0.5
    weights = np.clip(1 - np.abs(place - centre) / np.maximum(scale, 1), 0, None)
    weights *= (start < place) & (place < start + length)
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)
