"""The autoencoder, the diffusion models and their pipelines, as diffusers has them.

Importing it lets `diffusers.DiffusionPipeline.from_pretrained` load what our pipelines saved.
"""

import logging

import diffusers

from pronghorn.dcae.diffusers.acceleration import accelerate_dcae
from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC
from pronghorn.dcae.diffusers.dit import DiT2DModel
from pronghorn.dcae.diffusers.guidance import guided
from pronghorn.dcae.diffusers.pipelines import DCAEDiTPipeline, USiTPipeline, UViTPipeline
from pronghorn.dcae.diffusers.schedulers import DPMSolverFastScheduler, FlowODEScheduler
from pronghorn.dcae.diffusers.tiling import stream_decode, tiled_decode, tiled_encode
from pronghorn.dcae.diffusers.uvit import SIZES, UViT2DModel

__all__ = [
    "SIZES",
    "AutoencoderDC",
    "DCAEDiTPipeline",
    "DPMSolverFastScheduler",
    "DiT2DModel",
    "FlowODEScheduler",
    "USiTPipeline",
    "UViT2DModel",
    "UViTPipeline",
    "accelerate_dcae",
    "guided",
    "register",
    "stream_decode",
    "tiled_decode",
    "tiled_encode",
]

logger = logging.getLogger(__name__)


def register() -> None:
    """Put our pipelines where `DiffusionPipeline.from_pretrained` looks a class up by name: into diffusers itself.

    A class of that name that is there already stays, with a warning: ours then loads through itself alone.
    """
    for pipeline in (UViTPipeline, USiTPipeline, DCAEDiTPipeline):
        if getattr(diffusers, pipeline.__name__, pipeline) is not pipeline:
            logger.warning("diffusers has another %s: use ours for what it saved", pipeline.__name__)
        else:
            setattr(diffusers, pipeline.__name__, pipeline)


register()
