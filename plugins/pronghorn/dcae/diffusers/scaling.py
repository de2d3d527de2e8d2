"""The scaling factor of latents, written into the folder of an autoencoder that has none, or another one."""

from __future__ import annotations

import json
from pathlib import Path

from pronghorn.files.json_files import parse_json
from pronghorn.files.sealed import INDEX, check_seal, seal


def scalable_folder(model: str | Path) -> Path:
    """Where a scaling factor can be written.

    Raises:
        ValueError: it is no folder in diffusers' layout.
    """
    folder = Path(model)
    path = folder / "config.json"
    found = parse_json(path.read_bytes(), path) if path.is_file() else None
    if not isinstance(found, dict) or "_class_name" not in found:
        raise ValueError(
            f"model: got {model}, which has no place for a scaling factor; wanted a folder in diffusers' layout, as "
            "`pronghorn dcae convert` writes it"
        )
    return folder


def write_scaling_factor(folder: Path, value: float) -> None:
    """Set it in the configuration of a folder, which is sealed anew if it was sealed.

    Raises:
        ValueError: see `scalable_folder`; or the folder is not as it was sealed.
    """
    path = scalable_folder(folder) / "config.json"
    check_seal(folder)
    config = {**parse_json(path.read_bytes(), path), "scaling_factor": value}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
    if (folder / INDEX).is_file():
        seal(folder)
