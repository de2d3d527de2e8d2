"""DC-AE: autoencoders that make an image 32, 64 or 128 times smaller on each edge, for diffusion on few tokens.

For whoever runs or trains latent diffusion. `AutoencoderDC` is diffusers' own with what it lacks: official weights in
and out, adaptive channels (Chen et al., arXiv 2410.10733 and 2508.00413).

    from pronghorn.dcae import AutoencoderDC

    vae = AutoencoderDC.from_efficientvit("dc-ae-f32c32-in-1.0")  # a folder of the official code's
    latent = vae.encode(image).latent
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.dcae.config import CONFIGURATIONS, DCAEConfig, published
    from pronghorn.dcae.convert import to_diffusers, to_efficientvit
    from pronghorn.dcae.diffusers import (
        AutoencoderDC,
        DCAEDiTPipeline,
        DiT2DModel,
        DPMSolverFastScheduler,
        FlowODEScheduler,
        USiTPipeline,
        UViT2DModel,
        UViTPipeline,
        accelerate_dcae,
    )
    from pronghorn.dcae.diffusers.training import AutoencoderTrainer, DiffusionTrainer
    from pronghorn.dcae.diffusion import DiffusionConfig
    from pronghorn.dcae.objectives import FlowObjective, LearnedVarianceObjective, NoiseObjective
    from pronghorn.dcae.phases import PhaseConfig

__all__ = [
    "CONFIGURATIONS",
    "AutoencoderDC",
    "AutoencoderTrainer",
    "DCAEConfig",
    "DCAEDiTPipeline",
    "DPMSolverFastScheduler",
    "DiT2DModel",
    "DiffusionConfig",
    "DiffusionTrainer",
    "FlowODEScheduler",
    "FlowObjective",
    "LearnedVarianceObjective",
    "NoiseObjective",
    "PhaseConfig",
    "USiTPipeline",
    "UViT2DModel",
    "UViTPipeline",
    "accelerate_dcae",
    "published",
    "to_diffusers",
    "to_efficientvit",
]

_ROOMS = {
    "AutoencoderDC": "diffusers",
    "AutoencoderTrainer": "diffusers.training",
    "CONFIGURATIONS": "config",
    "DCAEConfig": "config",
    "DCAEDiTPipeline": "diffusers",
    "DPMSolverFastScheduler": "diffusers",
    "DiT2DModel": "diffusers",
    "DiffusionConfig": "diffusion",
    "DiffusionTrainer": "diffusers.training",
    "FlowODEScheduler": "diffusers",
    "FlowObjective": "objectives",
    "LearnedVarianceObjective": "objectives",
    "NoiseObjective": "objectives",
    "PhaseConfig": "phases",
    "USiTPipeline": "diffusers",
    "UViT2DModel": "diffusers",
    "UViTPipeline": "diffusers",
    "accelerate_dcae": "diffusers",
    "published": "config",
    "to_diffusers": "convert",
    "to_efficientvit": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
