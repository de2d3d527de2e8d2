"""What a folder of latents was made by, in a file beside them: so that latents of two autoencoders never mix."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pronghorn.dcae.digests import digest_of_weights
from pronghorn.files.json_files import load_json, save_json

NAME, FORMAT = "latents.json", 1
DECODING = ("decoder", "post_quant_conv")  # parts of an autoencoder that make no latents


def check_scaling_factor(value: float) -> None:
    """Raise ValueError for a factor that would make nothing of latents, or turn them round."""
    if not 0 < value < math.inf:
        raise ValueError(f"scaling_factor: got {value}, wanted a finite number above 0")


def dump_record(
    vae: Any, images: Path, paths: Sequence[Path], size: int, scaling_factor: float, shift_factor: float
) -> dict[str, Any]:
    """What latents depend on.

    Args:
        vae: the autoencoder.
        images: folder of the images.
        paths: of the images.
        size: of the squares that are cut from them.
        scaling_factor: what latents are multiplied with.
        shift_factor: what is taken off them first.
    """
    encoder = nn.ModuleList([part for name, part in vae.named_children() if name not in DECODING])
    parts = [path.relative_to(images).parts for path in paths]
    return {
        "encoder": digest_of_weights(encoder), "size": size, "scaling_factor": float(scaling_factor),
        "shift_factor": float(shift_factor),
        "classes": sorted({names[0] for names in parts if len(names) > 1}),
    }  # fmt: skip


def check_dump(folder: Path, record: dict[str, Any], *, begun: bool) -> None:
    """Raise ValueError, with the names of what differs, if a folder's latents were made by something else.

    Args:
        folder: of the latents.
        record: what is to make more of them.
        begun: some are there.
    """
    path = folder / NAME
    if path.exists():
        before = load_json(path, newest=FORMAT)
        if not isinstance(before, dict):
            raise ValueError(f"{path}: got {type(before).__name__}, wanted what latents were made by")
        names = [name for name in record if before.get(name) != record[name]]
        if names:
            told = "; ".join(f"{name} was {before.get(name)!r} and is {record[name]!r}" for name in names)
            raise ValueError(f"folder: {folder} holds latents that were made otherwise: {told}; wanted another folder")
    elif begun:
        raise ValueError(
            f"folder: {folder} holds latents, and no {NAME} says what made them; wanted another folder. Or, if they "
            f"were made as now, write into {path}: {json.dumps(record)}"
        )


def write_dump_record(folder: Path, record: dict[str, Any]) -> None:
    """Keep what latents are made by, unless that was done before."""
    if not (folder / NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / NAME, record, format=FORMAT)
