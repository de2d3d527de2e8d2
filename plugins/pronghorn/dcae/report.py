"""The reports and model cards beside what was converted, of which nothing changed, and what was trained."""

from __future__ import annotations

import json
import time
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pronghorn.checkpoint.card import Report, write_report
from pronghorn.dcae.diffusers.loading import load_dcae
from pronghorn.dcae.metrics import ReconstructionMetrics, reconstructed

if TYPE_CHECKING:
    from pronghorn.dcae.diffusers.training import AutoencoderTrainer, DiffusionTrainer

SEED, LEAST_EDGE = 0, 64
LAST = 100  # steps, of which a card has the mean loss
USAGE = {
    "diffusers": 'from diffusers import AutoencoderDC\n\nvae = AutoencoderDC.from_pretrained("CHECKPOINT")',
    "plain": 'from pronghorn.dcae import AutoencoderDC\n\nvae = AutoencoderDC.from_pretrained("CHECKPOINT")',
    "efficientvit": (
        'from pronghorn.dcae.diffusers import AutoencoderDC\n\nvae = AutoencoderDC.from_efficientvit("CHECKPOINT")'
    ),
}


def write_conversion_report(
    folder: Path, vae: Any, source: str, layout: str, base_model: str | None = None, name: str | None = None
) -> str:
    """Read a converted autoencoder back, compare it with its source, and write `quality.json` and `README.md`.

    Args:
        folder: that was written.
        vae: the source, in evaluation mode.
        source: where it was loaded from.
        layout: that was written, "diffusers" or "efficientvit".
        base_model: what the card calls the source; by default its hub name, or its folder's name.
        name: see `write_report`.

    Returns:
        What the report says, in a line.

    Raises:
        ValueError: what was written does not load.
    """
    start = time.perf_counter()
    again = load_dcae(folder, config=vae.architecture)
    before, after = vae.state_dict(), again.state_dict()
    equal = sum(name in after and torch.equal(tensor, after[name]) for name, tensor in before.items())
    edge = max(LEAST_EDGE, 2 * vae.spatial_compression_ratio)
    shape = (1, vae.architecture.in_channels, edge, edge)
    image = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(SEED)).to(vae.dtype) - 1
    with torch.no_grad():
        apart = float((reconstructed(vae, image) - reconstructed(again, image)).abs().max())
    figures = {"tensors": len(before), "tensors equal bit for bit": equal, "largest difference of a picture": apart}
    seconds = time.perf_counter() - start
    write_report(
        folder,
        Report(
            method=f"DC-AE in {layout}'s layout", source=source, library_name="diffusers",
            recipe={"layout": layout, "architecture": vae.architecture.to_dict()}, figures=figures,
            data=f"a random picture of {edge} x {edge} pixels", usage=_usage(vae, layout),
            tags=("dc-ae", "autoencoder"), seed=SEED, base_model=base_model, seconds=seconds,
        ),
        name,
    )  # fmt: skip
    return f"{equal} of {len(before)} tensors equal, pictures at most {apart:g} apart; card in {seconds:.1f} s"


class TrainingReport:
    """Compares an autoencoder with what it was before a phase of its training.

    Args:
        trainer: that is about to begin; its autoencoder is looked at now.
        source: folder, file or hub name that the autoencoder was loaded from; None where its weights are random.
        base_model: what the card calls it.
    """

    def __init__(self, trainer: AutoencoderTrainer, source: str | None, base_model: str | None) -> None:
        self.trainer, self.source, self.base_model = trainer, source, base_model
        started = time.perf_counter()
        self.digests = {} if source is None else _digests(trainer.vae)
        self.before = None if source is None else trainer.evaluate()
        self.seconds = time.perf_counter() - started

    def write(self, folder: Path, metrics: ReconstructionMetrics | None) -> str:
        """Write `quality.json` and `README.md` beside the trained autoencoder; what they say, in a line.

        Args:
            folder: of the autoencoder.
            metrics: that `AutoencoderTrainer.fit` gave.
        """
        started, config = time.perf_counter(), self.trainer.config
        after = _digests(self.trainer.vae)
        kept = sum(self.digests.get(name) == digest for name, digest in after.items())
        figures: dict[str, Any] = {"tensors": len(after)}
        if self.source is not None:
            figures["tensors equal bit for bit"] = kept
        for name, found in (("source", self.before), ("trained", metrics)):
            if found is not None:
                figures[name] = {metric: value for metric, value in found.to_dict().items() if value is not None}
        data = "its weights alone, as no images were held out"
        if metrics is not None:
            data = f"{metrics.images} images that were held out, {config.resolution} pixels on an edge"
        write_report(
            folder,
            Report(
                method=f"DC-AE training, phase {config.phase}", source=self.source, library_name="diffusers",
                recipe=config.to_dict(), figures=figures, data=data, usage=_usage(self.trainer.vae, "diffusers"),
                tags=("dc-ae", "autoencoder"), seed=config.seed, base_model=self.base_model,
                seconds=self.seconds + time.perf_counter() - started,
            ),
        )  # fmt: skip
        return f"{folder}: {kept} of {len(after)} tensors as they were; model card"


def write_diffusion_report(folder: Path, trainer: DiffusionTrainer, images: int) -> None:
    """Write `quality.json` and `README.md` beside a diffusion model that was trained on latents.

    Args:
        folder: of the model.
        trainer: that made it.
        images: as many latents as there are.
    """
    from pronghorn.dcae.diffusers.training.loop import LOG

    model, config = trainer.model, trainer.config
    losses = [json.loads(line)["loss"] for line in (trainer.output / LOG).read_text().splitlines()]
    name = type(model).__name__
    write_report(
        folder,
        Report(
            method=f"DC-AE's {config.method}", source=None, library_name="diffusers",
            recipe={**config.to_dict(), "model": dict(model.config)},
            figures={"parameters": model.num_parameters(), "mean loss": fmean(losses[-LAST:])},
            data=f"the last {min(LAST, len(losses))} steps of its training on {images} latents",
            usage=f'from pronghorn.dcae import {name}\n\nmodel = {name}.from_pretrained("CHECKPOINT")',
            tags=("dc-ae", "diffusion"), seed=config.seed,
        ),
    )  # fmt: skip


def _usage(vae: Any, layout: str) -> str:
    """diffusers' own class has no model without stage shortcuts."""
    return USAGE["plain" if layout == "diffusers" and not vae.config.stage_shortcuts else layout]


def _digests(module: nn.Module) -> dict[str, str]:
    """SHA-256 of each tensor: a second copy of the weights would take memory that training needs."""
    return {name: _digest(tensor) for name, tensor in module.state_dict().items()}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha256(flat.view(torch.uint8).numpy().data).hexdigest()
