"""Training: an autoencoder phase by phase, and diffusion on its latents."""

from pronghorn.dcae.diffusers.training.autoencoder import AutoencoderTrainer
from pronghorn.dcae.diffusers.training.latents import DiffusionTrainer, Latents
from pronghorn.dcae.diffusers.training.models import new_model

__all__ = ["AutoencoderTrainer", "DiffusionTrainer", "Latents", "new_model"]
