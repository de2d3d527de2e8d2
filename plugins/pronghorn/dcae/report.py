"""The report and model card beside an autoencoder that was converted: that nothing of it changed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pronghorn.checkpoint.card import Report, write_report
from pronghorn.dcae.diffusers.loading import load_dcae
from pronghorn.dcae.metrics import reconstructed

SEED, LEAST_EDGE = 0, 64
USAGE = {
    "diffusers": 'from diffusers import AutoencoderDC\n\nvae = AutoencoderDC.from_pretrained("CHECKPOINT")',
    "efficientvit": (
        'from pronghorn.dcae.diffusers import AutoencoderDC\n\nvae = AutoencoderDC.from_efficientvit("CHECKPOINT")'
    ),
}


def write_conversion_report(folder: Path, vae: Any, source: str, layout: str, base_model: str | None = None) -> str:
    """Read a converted autoencoder back, compare it with its source, and write `quality.json` and `README.md`.

    Args:
        folder: that was written.
        vae: the source, in evaluation mode.
        source: where it was loaded from.
        layout: that was written, "diffusers" or "efficientvit".
        base_model: what the card calls the source; by default its hub name, or its folder's name.

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
            data=f"a random picture of {edge} x {edge} pixels", usage=USAGE[layout], tags=("dc-ae", "autoencoder"),
            seed=SEED, base_model=base_model, seconds=seconds,
        ),
    )  # fmt: skip
    return (
        f"{folder}: {equal} of {len(before)} tensors equal, pictures at most {apart:g} apart; card in {seconds:.1f} s"
    )
