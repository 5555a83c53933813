"""Images with labels as a data set that training draws from, in memory or on the disk, and how it varies them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import TrainerCallback

from tasks.command import sentence
from tasks.identity import fingerprint
from tasks.image_classification.augmentation import Augmentation
from tasks.image_classification.catalogue import Images


class Split(Dataset):
    """
    Images, as bytes, and labels, fetched a batch at a time. What is random depends on (seed, epoch, index) alone.

    Not on the process's random stream: the Trainer draws examples before it restores that stream, so a resumed run would
    see other crops than the uninterrupted one, and so would one with another number of workers.

    Args:
        images (`np.ndarray`): (N, H, W, C), bytes.
        labels (`np.ndarray`): (N,).
        augmentation ([`Augmentation`], *optional*): how they are varied.
        seed (`int`, *optional*, defaults to 0): of that.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, augmentation: Augmentation | None = None, seed: int = 0
    ):
        self.labels = labels
        self.augmentation, self.seed = augmentation, seed
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        self.padded = pixels if augmentation is None else augmentation.pad(pixels)
        # Shared, so that workers that outlive an epoch see the next one.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """(N, C, H, W), as they are without augmentation."""
        p = 0 if self.augmentation is None else self.augmentation.images.padding
        height, width = self.padded.shape[2:]
        return torch.from_numpy(self.padded[:, :, p : height - p, p : width - p])

    @property
    def fingerprint(self) -> str:
        """Twelve digits that stand for the images and their labels."""
        return fingerprint(self.images.numpy(), self.labels)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """What a DataLoader asks for, the examples of a batch: a hundred times as fast as one by one."""
        index = np.asarray(indices, dtype=np.int64)
        if self.augmentation is None:
            batch = self.padded[index]
        else:
            batch = self.augmentation(self.padded, index, self._draws(self.augmentation))
        pairs = zip(torch.from_numpy(batch), self.labels[index].tolist(), strict=True)
        return [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]

    def _draws(self, augmentation: Augmentation) -> np.ndarray:
        epoch = int(self.epoch)
        if self._drawn is None or self._drawn[0] != epoch:  # some milliseconds, once an epoch
            self._drawn = epoch, augmentation.draw(self.seed, epoch, len(self))
        return self._drawn[1]


class Pictures(Dataset):
    """
    Images that are read from the disk one by one, as bytes, and labels. What is random depends on (seed, epoch, index) alone.

    Args:
        files (`np.ndarray`): (N,), paths.
        labels (`np.ndarray`): (N,).
        images ([`Images`]): says how they are cropped.
        varied (`bool`, *optional*, defaults to `False`): cropped and flipped at random, or the middle of each.
        seed (`int`, *optional*, defaults to 0): of that.
    """

    def __init__(self, files: np.ndarray, labels: np.ndarray, images: Images, varied: bool = False, seed: int = 0):
        self.files, self.labels, self.varied, self.seed = files, labels, varied, seed
        if varied:
            crop = [v2.RandomResizedCrop(images.size, images.crop_share), v2.RandomHorizontalFlip()]
        else:
            crop = [v2.Resize(images.resize), v2.CenterCrop(images.size)]
        self.transform = v2.Compose([*crop, v2.PILToTensor()])
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """
        Twelve digits that stand for the names and the sizes of the files, and their labels. Reading all of them would take hours; other
        pictures of the same names seldom have the same sizes.
        """
        names = "\n".join(f"{file.parent.name}/{file.name} {file.stat().st_size}" for file in self.files)
        return fingerprint(np.frombuffer(names.encode(), np.uint8), self.labels)

    def __getitem__(self, i: int) -> dict:
        try:
            with Image.open(self.files[i]) as picture:
                picture = picture.convert("RGB")
        except Exception as error:  # of Pillow's decoders
            raise ValueError(f"{self.files[i]} is not a picture: {sentence(error)}. Fetch it again.") from error
        # The transforms know the process's generator only. It alone is seeded, and given back: not those of GPUs.
        stream = torch.default_generator
        before = stream.get_state()
        try:
            key = np.random.SeedSequence([self.seed, int(self.epoch), i]).generate_state(1, np.uint64)
            stream.manual_seed(int(key[0] >> np.uint64(1)))
            pixels = self.transform(picture)
        finally:
            stream.set_state(before)
        return {"pixel_values": pixels, "labels": int(self.labels[i])}


class EpochCallback(TrainerCallback):
    """Tells the training images which epoch it is, also when a run is resumed inside one."""

    def __init__(self, split: Split | Pictures):
        self.split = split

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.split.epoch.fill_(int(state.epoch or 0))
