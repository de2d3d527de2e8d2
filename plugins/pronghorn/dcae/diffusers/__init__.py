"""The autoencoder and the diffusion models, as diffusers has them."""

from pronghorn.dcae.diffusers.acceleration import accelerate_dcae
from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC
from pronghorn.dcae.diffusers.tiling import stream_decode, tiled_decode, tiled_encode
from pronghorn.dcae.diffusers.uvit import SIZES, UViT2DModel, guided

__all__ = [
    "SIZES",
    "AutoencoderDC",
    "UViT2DModel",
    "accelerate_dcae",
    "guided",
    "stream_decode",
    "tiled_decode",
    "tiled_encode",
]
