"""Random crops, flips and blank squares: a batch at a time, and the same for an image whatever batch it is in."""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tasks.image_classification.catalogue import Images


@dataclass(frozen=True)
class Augmentation:
    """
    How training varies the images of a data set.

    Args:
        images ([`Images`]): says how they are cropped and flipped.
        cutout (`int`, *optional*, defaults to 0): edge in pixels of a square that is blanked out with the data set's mean, as in
            DeVries & Taylor 2017 (arXiv:1708.04552). Theirs may stick out at the edges; this one stays inside.
    """

    images: Images
    cutout: int = 0

    @property
    def is_none(self) -> bool:
        """Whether it leaves all images as they are."""
        return not (self.images.padding or self.images.flip or self.cutout)

    def draw(self, seed: int, epoch: int, n: int) -> np.ndarray:
        """
        What happens to each of `n` images in an epoch, (n, 5): row and column of the crop, flipped or not, row and column of the
        blank square. A row depends on seed, epoch and its index alone.
        """
        places, blanks = 2 * self.images.padding + 1, self.images.size - self.cutout + 1
        kinds = [places, places, 2 if self.images.flip else 1, blanks, blanks]
        return np.random.default_rng([seed, epoch]).integers(0, kinds, size=(n, len(kinds)))

    def pad(self, pixels: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) with the data set's padding."""
        edge = (self.images.padding, self.images.padding)
        # The type checker of numpy knows the modes by their names only.
        return np.pad(pixels, ((0, 0), (0, 0), edge, edge), mode=self.images.padding_mode)  # type: ignore[call-overload]

    def __call__(self, padded: np.ndarray, index: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """
        A batch of varied images.

        Args:
            padded (`np.ndarray`): all images, as [`pad`] returns them: bytes.
            index (`np.ndarray`): (B,), which of them.
            draws (`np.ndarray`): (N, 5), of all images, as [`draw`] returns them.

        Returns:
            `np.ndarray`: (B, C, H, W), bytes of its own.
        """
        size = self.images.size
        top, left, flipped, row, column = draws[index].T
        batch = sliding_window_view(padded, (size, size), axis=(2, 3))[index, :, top, left]
        mirrored = flipped == 1
        batch[mirrored] = batch[mirrored][..., ::-1]
        if self.cutout:
            squares = sliding_window_view(batch, (self.cutout, self.cutout), axis=(2, 3), writeable=True)
            blank = np.round(255 * np.array(self.images.mean)).astype(np.uint8)
            squares[np.arange(len(index)), :, row, column] = blank[:, None, None]
        return batch
