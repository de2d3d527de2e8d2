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
from pronghorn.dcae.diffusers.plain_config import CLASS as PLAIN
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
    """Put our classes where diffusers looks one up by the name in a folder: into diffusers itself.

    They are our pipelines, and the autoencoder under the name that it has without stage shortcuts.

    A class of that name that is there already stays, with a warning: ours then loads through itself alone.
    """
    pipelines: tuple[type, ...] = (UViTPipeline, USiTPipeline, DCAEDiTPipeline)
    ours: dict[str, type] = {**{pipeline.__name__: pipeline for pipeline in pipelines}, PLAIN: AutoencoderDC}
    for name, kind in ours.items():
        if getattr(diffusers, name, kind) is not kind:
            logger.warning("diffusers has another %s: use ours for what it saved", name)
        else:
            setattr(diffusers, name, kind)


register()
