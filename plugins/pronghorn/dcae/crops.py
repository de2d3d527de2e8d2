"""Random squares of images, for training: that of a number is always the same, however training was broken off."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pronghorn.dcae.images import to_tensor
from pronghorn.dcae.sources import Sources

ENDLESS = 2**62  # as long as `len` can tell


class Crops(Dataset[Tensor]):
    """Crop number `index` of a stream without end: an image, shrunk by a random factor, a place in it, mirrored or not.

    Args:
        images: a folder, files, images, tensors or a `datasets.Dataset`, see `Sources`.
        size: edge of a crop, in pixels.
        seed: of all random choices.
        zoom: the shorter edge of an image is shrunk to at most so many times `size`; 1 takes all of its middle.

    Raises:
        ValueError: some images cannot be read or are smaller than a crop, which are all named; there are none, or a
            setting is out of its range. TypeError: see `Sources`.
    """

    def __init__(self, images: Any, *, size: int, seed: int = 0, zoom: float = 2.0) -> None:
        if size < 1 or not zoom >= 1:
            raise ValueError(f"size, zoom: got {size} and {zoom}, wanted at least 1 for both")
        self.images = Sources(images)
        self.images.check(size)  # one that is found by the draw of a late step would end a training
        self.size, self.seed, self.zoom = size, seed, zoom

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        random = np.random.default_rng([self.seed, index])
        which = int(random.integers(len(self.images)))
        image = self.images[which]
        shorter = min(image.size)
        edge = random.uniform(self.size, min(shorter, self.zoom * self.size))
        width, height = (max(self.size, round(length * edge / shorter)) for length in image.size)
        left, top = (int(random.integers(length - self.size + 1)) for length in (width, height))
        scale = image.size[0] / width, image.size[1] / height
        box = left * scale[0], top * scale[1], (left + self.size) * scale[0], (top + self.size) * scale[1]
        crop = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = to_tensor(crop)
        return pixels.flip(2) if random.integers(2) else pixels

    def digest(self) -> str:
        """Of what the images are, see `Sources.digest`."""
        return self.images.digest()


def batches(images: list[Tensor], size: int) -> list[Tensor]:
    """Stacks of at most so many."""
    return [torch.stack(images[start : start + size]) for start in range(0, len(images), size)]
