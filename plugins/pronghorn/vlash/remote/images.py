"""Camera images as JPEG, which makes a message small; it takes Pillow."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash.remote.container import MessageError

COLORS = 3


@dataclass(frozen=True)
class Packed:
    """Where the images of one camera are in a tensor of bytes.

    Attributes:
        shape: [..., height, width, 3], what they come to.
        sizes: bytes of each of them.
    """

    shape: list[int]
    sizes: list[int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def is_image(value: Tensor) -> bool:
    """Whether it is what a camera gives: uint8 [..., height, width, 3]."""
    return value.dtype == torch.uint8 and value.dim() >= COLORS and value.shape[-1] == COLORS


def pack_images(images: Tensor, quality: int) -> tuple[Packed, Tensor]:
    """Compress.

    Args:
        images: uint8 [..., height, width, 3].
        quality: of JPEG, 1 to 95.

    Returns:
        How to read them, and uint8 [bytes].
    """
    from PIL import Image

    files = []
    for image in images.cpu().flatten(0, -4) if images.dim() > COLORS else images.cpu()[None]:
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    return Packed(list(images.shape), [len(file) for file in files]), data


def unpack_images(name: str, packed: Any, data: Tensor, most_bytes: int) -> Tensor:
    """Undo `pack_images`.

    Args:
        name: of the camera, for errors.
        packed: of a message, as `Packed.to_dict` gives it.
        data: uint8 [bytes].
        most_bytes: that they may come to.

    Raises:
        MessageError: they are no JPEG images of that size.
    """
    from PIL import Image, UnidentifiedImageError

    shape, sizes = _checked(name, packed, data, most_bytes)
    height, width, _ = shape[-COLORS:]
    images = []
    for piece in data.split(sizes):
        try:
            with Image.open(io.BytesIO(piece.numpy().tobytes()), formats=["JPEG"]) as image:
                if (image.size, image.mode) != ((width, height), "RGB"):
                    raise MessageError(f"{name}: got {image.mode} {image.size}, wanted RGB {(width, height)}")
                # The size is known before anything is decoded.
                images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
            raise MessageError(f"{name}: no JPEG image, {error}") from error
    return torch.cat(images).view(shape)


def _checked(name: str, packed: Any, data: Tensor, most_bytes: int) -> tuple[list[int], list[int]]:
    whole = isinstance(packed, dict) and set(packed) == {"shape", "sizes"}
    lists = whole and all(
        isinstance(values, list) and all(type(value) is int and value > 0 for value in values)
        for values in packed.values()
    )
    shape, sizes = (packed["shape"], packed["sizes"]) if lists else ([], [])
    fits = (
        len(shape) >= COLORS
        and shape[-1] == COLORS
        and prod(shape) <= most_bytes
        and prod(shape[:-COLORS]) == len(sizes)
        and data.dtype == torch.uint8
        and list(data.shape) == [sum(sizes)]
    )
    if not fits:
        raise MessageError(f"{name}: its images are not [..., height, width, 3] of at most {most_bytes} bytes")
    return shape, sizes
