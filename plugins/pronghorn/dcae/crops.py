"""Random squares of images, for training: that of a number is always the same, however training was broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pronghorn.dcae.digests import digest, digest_of_files
from pronghorn.dcae.images import find_images, open_image, to_tensor

COLUMN = "image"
ENDLESS = 2**62  # as long as `len` can tell


class Crops(Dataset[Tensor]):
    """Crop number `index` of a stream without end: an image, shrunk by a random factor, a place in it, mirrored or not.

    Args:
        images: a folder; or files, PIL images, or tensors [3, height, width] from -1 to 1; or a `datasets.Dataset` with
            a column "image".
        size: edge of a crop, in pixels.
        seed: of all random choices.
        zoom: the shorter edge of an image is shrunk to at most so many times `size`; 1 takes all of its middle.

    Raises:
        ValueError: there are no images, or a setting is out of its range.
    """

    def __init__(self, images: Any, *, size: int, seed: int = 0, zoom: float = 2.0) -> None:
        if size < 1 or not zoom >= 1:
            raise ValueError(f"size, zoom: got {size} and {zoom}, wanted at least 1 for both")
        self.folder = Path(images) if isinstance(images, str | Path) else None
        self.images = find_images(images) if isinstance(images, str | Path) else images
        if len(self.images) == 0:
            raise ValueError("images: there are none")
        self.size, self.seed, self.zoom = size, seed, zoom

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        random = np.random.default_rng([self.seed, index])
        which = int(random.integers(len(self.images)))
        image = _opened(self.images, which)
        shorter = min(image.size)
        if shorter < self.size:
            raise ValueError(f"image {_name(self.images, which)}: is {image.size[0]} x {image.size[1]}, "
                             f"wanted at least {self.size} pixels each")  # fmt: skip
        edge = random.uniform(self.size, min(shorter, self.zoom * self.size))
        width, height = (max(self.size, round(length * edge / shorter)) for length in image.size)
        left, top = (int(random.integers(length - self.size + 1)) for length in (width, height))
        scale = image.size[0] / width, image.size[1] / height
        box = left * scale[0], top * scale[1], (left + self.size) * scale[0], (top + self.size) * scale[1]
        crop = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = to_tensor(crop)
        return pixels.flip(2) if random.integers(2) else pixels

    def digest(self) -> str:
        """Of what the images are, as far as that is known without decoding them."""
        if self.folder is not None:
            return digest_of_files(self.images, self.folder)
        if hasattr(self.images, "column_names"):
            return digest([len(self.images), self.images.column_names])
        return digest([_described(self.images[which]) for which in range(len(self.images))])


def squares(images: Any, *, size: int) -> list[Tensor]:
    """The middle square of every image, [3, size, size] from -1 to 1, for evaluation."""
    found = find_images(images) if isinstance(images, str | Path) else images
    return [to_tensor(_opened(found, which), size=size) for which in range(len(found))]


def _opened(images: Any, which: int) -> Image.Image:
    found = images[which]
    if isinstance(found, dict):
        if COLUMN not in found:
            raise ValueError(f'images: have the columns {sorted(found)}, wanted one named "{COLUMN}"')
        found = found[COLUMN]
    if isinstance(found, str | Path):
        return open_image(found)
    if isinstance(found, Image.Image):
        return found.convert("RGB")
    if not isinstance(found, Tensor):
        raise TypeError(f"images: got a {type(found).__name__}, accepted are files, PIL images and tensors")
    if found.dim() != 3 or found.shape[0] != 3 or not found.isfinite().all() or found.abs().max() > 1:
        raise ValueError(f"image {which}: got {tuple(found.shape)}, wanted [3, height, width] of numbers from -1 to 1")
    return Image.fromarray(((found + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def _described(image: Any) -> Any:
    if isinstance(image, str | Path):
        return str(image), Path(image).stat().st_size
    return list(image.shape) if isinstance(image, Tensor) else list(getattr(image, "size", ()))


def _name(images: Any, which: int) -> str:
    return str(images[which]) if isinstance(images[which], str | Path) else str(which)


def batches(images: list[Tensor], size: int) -> list[Tensor]:
    """Stacks of at most so many."""
    return [torch.stack(images[start : start + size]) for start in range(0, len(images), size)]
