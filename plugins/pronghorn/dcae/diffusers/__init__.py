"""The autoencoder and the diffusion models, as diffusers has them."""

from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC
from pronghorn.dcae.diffusers.uvit import SIZES, UViT2DModel, guided

__all__ = ["SIZES", "AutoencoderDC", "UViT2DModel", "guided"]
