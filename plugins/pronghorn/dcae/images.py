"""Images from folders, as tensors from -1 to 1."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pronghorn.dcae.folders import files_in

# What Pillow raises of damaged files, beside what it documents.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, Image.DecompressionBombError)
Found = TypeVar("Found")
logger = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def find_images(folder: str | Path) -> list[Path]:
    """Image files of a folder and of those in it, in order.

    Raises:
        ValueError: there are none, or the folder is none.
    """
    found = files_in(folder, SUFFIXES, argument="images")
    if not found:
        raise ValueError(f"{folder}: has no images; accepted are {', '.join(SUFFIXES)}")
    return found


def load_image(path: str | Path, *, size: int | None = None, multiple: int = 1) -> Tensor:
    """An image as float32 [3, height, width] from -1 to 1.

    Args:
        path: of the file.
        size: edge of the square from its middle, after the image was made so small that its shorter edge is as long; by
            default it stays as it is. Halved by box filter as long as it is twice as large, and then bicubic: how the
            official code prepares images.
        multiple: cut right and below to multiples of this.

    Raises:
        ValueError: the file is no image, or smaller than `multiple`.
    """
    image = open_image(path)
    if size is not None:
        image = _square(image, size)
    width, height = (edge // multiple * multiple for edge in image.size)
    if not width or not height:
        raise ValueError(f"{path}: is {image.size[0]} x {image.size[1]}, wanted at least {multiple} pixels each")
    return to_tensor(image.crop((0, 0, width, height)))


def open_image(path: str | Path) -> Image.Image:
    """An image file as `in_rgb` has it, of an animation its first picture.

    Raises:
        ValueError: it cannot be read as an image, has more pixels than Pillow takes, or more than 8 bits a channel.
    """
    try:
        return opened_file(path, in_rgb)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def opened_file(file: str | Path | BinaryIO, read: Callable[[Image.Image], Found]) -> Found:
    """What is read of an image file; without more, that is its head alone.

    Raises:
        ValueError: as of `open_image`.
    """
    try:
        with Image.open(file) as opened:
            check_bits(opened)
            return read(opened)
    except UNREADABLE as error:
        raise ValueError(f"cannot be read as an image: {error}") from error


def in_rgb(image: Image.Image) -> Image.Image:
    """An image upright, as its EXIF orientation says, in RGB as Pillow converts it: what is transparent has its colour.

    Raises:
        ValueError: it has more than 8 bits a channel.
    """
    check_bits(image)
    image.load()  # what fails after this concerns the orientation alone
    try:
        image = ImageOps.exif_transpose(image)
    except (*UNREADABLE, LookupError, TypeError, ArithmeticError) as error:
        _warn_once(f"the orientation of an image cannot be read, and it is taken as upright: {error}")
    return image.convert("RGB")


def check_bits(image: Image.Image) -> None:
    """Raise ValueError if an image has more than 8 bits a channel: Pillow would cut what is beyond 255."""
    if image.mode[:1] in ("I", "F"):
        raise ValueError(f"its mode is {image.mode}; wanted 8 bits for each channel")


def to_tensor(image: Image.Image, *, size: int | None = None) -> Tensor:
    """An image as float32 [3, height, width] from -1 to 1; with `size`, the square of its middle, see `load_image`."""
    pixels = torch.from_numpy(np.array(image if size is None else _square(image, size)))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_image(x: Tensor) -> Image.Image:
    """An image of [3, height, width] from -1 to 1; what is beyond is cut."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _square(image: Image.Image, size: int) -> Image.Image:
    if min(image.size) < 1:
        raise ValueError(f"image: is {image.size[0]} x {image.size[1]}, wanted at least one pixel")
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    if min(image.size) < size:
        _warn_once(f"images whose shorter edge is below {size} pixels are enlarged to it, as the official code does")
    scale = size / min(image.size)
    width, height = (round(edge * scale) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)
