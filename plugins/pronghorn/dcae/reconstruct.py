"""An image through an autoencoder and back, as a picture of both."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pronghorn.dcae.diffusers.tiling import tiled_decode, tiled_encode
from pronghorn.dcae.images import load_image, to_image
from pronghorn.dcae.metrics import Reconstruction
from pronghorn.estimate import Estimate, of_pieces


@dataclass(frozen=True)
class Reconstructed:
    """What came of an image.

    Attributes:
        latent: its shape, [channels, height, width].
        psnr: decibels.
    """

    latent: tuple[int, ...]
    psnr: float


@torch.no_grad()
def reconstruct(
    vae: Any, path: Path, target: Path, *, tile: int = 0, metrics: Reconstruction | None = None
) -> Reconstructed:
    """Encode and decode an image, and write it, cut to what the ratio divides, with its reconstruction on the right.

    Args:
        vae: an `AutoencoderDC` in evaluation mode.
        path: of the image.
        target: of the picture.
        tile: edge of a tile in pixels; 0 takes the image whole.
        metrics: takes the image and its reconstruction, too.

    Raises:
        ValueError: the image cannot be read, the tile does not fit, or see `Reconstruction.update`.
    """
    x = load_image(path, multiple=vae.spatial_compression_ratio)[None].to(vae.device)
    z = tiled_encode(vae, x, tile=tile) if tile else vae.encode(x).latent
    y = tiled_decode(vae, z, tile=tile) if tile else vae.decode(z).sample
    if metrics is not None:
        try:
            metrics.update(x, y)
        except ValueError as reason:
            raise ValueError(f"{path}: {reason}") from reason
    error = (y.clamp(-1, 1) - x).square().mean() / 4
    to_image(torch.cat([x[0], y[0]], dim=2)).save(target)
    return Reconstructed(tuple(z.shape[1:]), -10 * error.log10().item())


def rehearse_reconstruction(
    vae: Any, paths: Sequence[Path], *, tile: int = 0, metrics: Reconstruction | None = None
) -> Estimate:
    """What `reconstruct` takes of so many images, from the smallest to the largest of five; arguments likewise."""
    with tempfile.TemporaryDirectory() as folder:

        def work(index: int) -> int:
            target = Path(folder) / f"{index}.png"
            reconstruct(vae, paths[index], target, tile=tile, metrics=metrics)
            return target.stat().st_size

        return of_pieces([_pixels(path) for path in paths], work, vae.device, "images")


def _pixels(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height
