"""Images from wherever they are: a folder, files, PIL images, tensors, or a column of a `datasets.Dataset`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pronghorn.dcae.digests import digest, digest_of_files
from pronghorn.dcae.images import UNREADABLE, check_bits, find_images, in_rgb, open_image, opened_file, to_tensor

COLUMN = "image"
READERS = 8  # of headers, at once


class Sources:
    """Images that are opened when they are asked for, each by its number.

    Args:
        images: a folder; or files, PIL images, or tensors [3, height, width] from -1 to 1; or a `datasets.Dataset` with
            a column "image".

    Raises:
        ValueError: there are no images. TypeError: images cannot be had by their numbers, as of a stream.
    """

    def __init__(self, images: Any) -> None:
        self.folder = Path(images) if isinstance(images, str | Path) else None
        if isinstance(images, Mapping):
            raise TypeError(
                f"images: got a {type(images).__name__} of {', '.join(map(str, images))}; wanted one of these"
            )
        if self.folder is None and not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
            raise TypeError(f"images: got a {type(images).__name__}, wanted images that each can be had by its number, "
                            "such as a folder, a list or a datasets.Dataset")  # fmt: skip
        self._images = images if self.folder is None else find_images(self.folder)
        if not len(self._images):
            raise ValueError("images: there are none")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, which: int) -> Image.Image:
        try:
            found = _cell(self._images[which])  # which datasets decodes
        except UNREADABLE as error:
            raise ValueError(f"image {which}: {error}") from error
        if isinstance(found, str | Path):
            return open_image(found)
        try:
            if isinstance(found, Image.Image):
                return in_rgb(found)
            _check(found)
        except ValueError as error:
            raise ValueError(f"image {which}: {error}") from error
        return Image.fromarray(((found + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())

    def check(self, least: int, *, argument: str = "images") -> None:
        """Look at the head of every image, and decode none.

        Args:
            least: pixels that each must have on both edges.
            argument: what an error calls the images.

        Raises:
            ValueError: some are smaller, or cannot be read; all of them are named. TypeError: one is none.
        """
        images = self._undecoded()
        count = len(self)
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda which: _wrong(images[which], least), range(count))
            wrong = {which: told for which, told in enumerate(tqdm(found, total=count, desc="heads", delay=3)) if told}
        if wrong:
            lines = [f"{self.name(which)}: {told}" for which, told in wrong.items()]
            raise ValueError("\n".join((f"{argument}: {len(wrong)} of {count} cannot be used:", *lines)))

    def name(self, which: int) -> str:
        """Of a file, or the image's number."""
        listed = not hasattr(self._images, "column_names")
        found = self._images[which] if listed else None
        return str(found) if isinstance(found, str | Path) else f"image {which}"

    def digest(self) -> str:
        """Of what the images are, as far as that is known without decoding them."""
        if self.folder is not None:
            return digest_of_files(self._images, self.folder)
        if hasattr(self._images, "column_names"):
            return digest([len(self), self._images.column_names])
        return digest([_described(image) for image in self._images])

    def _undecoded(self) -> Any:
        """As they are, but of a `datasets.Dataset` files rather than pictures."""
        feature: Any = (getattr(self._images, "features", None) or {}).get(COLUMN)
        if not getattr(feature, "decode", False) or self._images.format["type"] is not None:
            return self._images
        return self._images.select_columns([COLUMN]).cast_column(COLUMN, type(feature)(decode=False))


def squares(images: Any, *, size: int, argument: str = "images") -> list[Tensor]:
    """The middle square of every image, [3, size, size] from -1 to 1, for evaluation.

    Args:
        images: see `Sources`.
        size: of a square; none is made larger to fill it.
        argument: what an error calls the images.

    Raises:
        ValueError: some images cannot be read or are smaller, which are all named; there are none. TypeError: see
            `Sources`.
    """
    found = Sources(images)
    found.check(size, argument=argument)
    return [to_tensor(found[which], size=size) for which in range(len(found))]


def _cell(found: Any) -> Any:
    """What of a row is the image."""
    if not isinstance(found, dict):
        return found
    if COLUMN not in found:
        raise ValueError(f'images: have the columns {sorted(found)}, wanted one named "{COLUMN}"')
    return found[COLUMN]


def _wrong(found: Any, least: int) -> str | None:
    """What is wrong with an image, as far as that shows without decoding it."""
    found = _cell(found)
    try:
        if isinstance(found, dict):  # of datasets, not decoded
            found = io.BytesIO(found["bytes"]) if found["bytes"] is not None else found["path"]
        if isinstance(found, str | Path | io.BytesIO):
            width, height = opened_file(found, lambda image: image.size)
        elif isinstance(found, Image.Image):
            check_bits(found)
            width, height = found.size
        else:
            _check(found)
            height, width = found.shape[1:]
    except ValueError as error:
        return str(error)
    return None if min(width, height) >= least else f"is {width} x {height}, wanted at least {least} pixels each"


def _check(image: Any) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"images: got a {type(image).__name__}, accepted are files, PIL images and tensors")
    if image.dim() != 3 or image.shape[0] != 3 or not image.isfinite().all() or image.abs().max() > 1:
        raise ValueError(f"got {tuple(image.shape)}, wanted [3, height, width] of numbers from -1 to 1")


def _described(image: Any) -> Any:
    if isinstance(image, str | Path):
        return str(image), Path(image).stat().st_size
    return list(image.shape) if isinstance(image, Tensor) else list(getattr(image, "size", ()))
