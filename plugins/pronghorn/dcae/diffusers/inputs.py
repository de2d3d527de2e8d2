"""What goes into an autoencoder, ours or diffusers', checked before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def check_images(vae: Any, x: Tensor) -> None:
    """Raise ValueError if x is not images [batch, in channels, height, width] that the ratio divides, in its dtype."""
    ratio, channels = vae.spatial_compression_ratio, vae.config.in_channels
    if x.dim() != 4 or x.shape[1] != channels or not x.numel() or x.shape[2] % ratio or x.shape[3] % ratio:
        wanted = f"[batch, {channels}, height, width] with multiples of {ratio}"
        raise ValueError(f"x: got {tuple(x.shape)}, wanted {wanted}, and at least one image")
    _check_dtype(vae, "x", x)


def whole_latents(vae: Any, z: Tensor) -> Tensor:
    """Latents [batch, channels, height, width] with all their channels, where an adaptive model's first are given.

    Raises:
        ValueError: the shape, the number of channels or the dtype does not fit.
    """
    if z.dim() != 4 or not z.numel():
        raise ValueError(f"z: got {tuple(z.shape)}, wanted [batch, channels, height, width], and at least one latent")
    _check_dtype(vae, "z", z)
    missing = vae.config.latent_channels - checked_channels(vae, "z", z.shape[1])
    # The decoder's first layer is linear, and nothing else reads the latent: zeros are as if they were not there.
    return functional.pad(z, (0, 0, 0, 0, 0, missing)) if missing else z


def checked_channels(vae: Any, name: str, count: int | None) -> int:
    """How many of a latent's first channels are meant, by default all.

    Raises:
        ValueError: there are not so many, or the autoencoder knows no fewer.
    """
    config = vae.config
    most: int = config.latent_channels
    if count is None or count == most:
        return most
    # diffusers' own class lacks the setting, and decodes all channels alone.
    adaptive = "latent_channels_list" in config and not (config.encoder_out_shortcut or config.decoder_in_shortcut)
    if not adaptive or not 1 <= count < most:
        accepted = f"1 to {most}, trained {tuple(config.latent_channels_list)}" if adaptive else str(most)
        raise ValueError(f"{name}: got {count} latent channels, accepted are {accepted}")
    return count


def _check_dtype(vae: Any, name: str, x: Tensor) -> None:
    if x.dtype != vae.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name}: got {x.dtype}, wanted the autoencoder's {vae.dtype}")
