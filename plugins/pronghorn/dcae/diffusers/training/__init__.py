"""Training: an autoencoder phase by phase, and diffusion on its latents."""

from pronghorn.dcae.diffusers.training.autoencoder import AutoencoderTrainer
from pronghorn.dcae.diffusers.training.latents import DiffusionTrainer

__all__ = ["AutoencoderTrainer", "DiffusionTrainer"]
