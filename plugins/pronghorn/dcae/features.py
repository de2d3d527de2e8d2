"""A feature network of the user's for rFID: tried on two images before any work, and told how many images it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.dcae.metrics import Features

PUBLISHED_IMAGES = 50_000  # ImageNet's for validation, of which papers tell rFID
logger = logging.getLogger(__name__)


@torch.no_grad()
def checked_features(
    name: str, function: Callable[..., Any], *, images: int, size: int, device: torch.device | str
) -> Features:
    """A feature network that is known to give features, in evaluation mode on a device if it is a module.

    Warns where there are no more images than features: the distance then depends on their number most of all.

    Args:
        name: of the network, for errors.
        function: of images [batch, 3, height, width] from -1 to 1, to features [batch, size].
        images: how many there will be.
        size: edge of the images that it is tried on.
        device: where the images will be.

    Raises:
        ValueError: it is a class, gives something else than finite [batch, size], or there are fewer than two images.
    """
    if images < 2:
        raise ValueError(f"rfid: got {images} image, wanted at least two, and for figures of papers {PUBLISHED_IMAGES}")
    if isinstance(function, type):
        raise ValueError(f"rfid: got {name!r}, which is a class; wanted a function of images, or a module that is made")
    if isinstance(function, nn.Module):
        function = function.to(device).eval()
    tried = torch.linspace(-1, 1, 2 * 3 * size * size, device=device).reshape(2, 3, size, size)
    found = function(tried)
    fits = isinstance(found, Tensor) and found.dim() == 2 and len(found) == 2 and found.is_floating_point()
    if not fits or not found.isfinite().all():
        got = type(found).__name__
        if isinstance(found, Tensor):
            got = f"{tuple(found.shape)} of {found.dtype}" if not fits else "numbers that are not finite"
        raise ValueError(
            f"rfid: got {name!r}, which makes {got} of images {tuple(tried.shape)}; wanted features [batch, size]"
        )
    if images <= found.shape[1]:
        logger.warning(
            "rfid: %d images for %d features; wanted more images than features, and papers have %d. "
            "Compare this with figures of the same images alone", images, found.shape[1], PUBLISHED_IMAGES,
        )  # fmt: skip
    return function
