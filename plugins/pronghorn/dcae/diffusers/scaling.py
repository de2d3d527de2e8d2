"""The scaling factor of latents, written into the folder of an autoencoder that has none, or another one."""

from __future__ import annotations

import json
from pathlib import Path

from pronghorn.files.atomic import remove_parts, write_atomically
from pronghorn.files.json_files import parse_json
from pronghorn.files.sealed import check_seal, seal

CONFIG = "config.json"
BEFORE = ".config.json.before"  # what it was, until the folder is sealed with what it is


def scalable_folder(model: str | Path) -> Path:
    """Where a scaling factor can be written. If writing one was broken off there, the folder is made whole first.

    Raises:
        ValueError: it is no folder in diffusers' layout.
    """
    folder = Path(model)
    path = folder / CONFIG
    found = parse_json(path.read_bytes(), path) if path.is_file() else None
    if not isinstance(found, dict) or "_class_name" not in found:
        raise ValueError(
            f"model: got {model}, which has no place for a scaling factor; wanted a folder in diffusers' layout, as "
            "`pronghorn dcae convert` writes it"
        )
    if (folder / BEFORE).is_file():
        _recover(folder)
    return folder


def write_scaling_factor(folder: Path, value: float) -> None:
    """Set it in the configuration of a folder, which is sealed anew if it was sealed.

    Raises:
        ValueError: see `scalable_folder`; or the folder is not as it was sealed.
        OSError: no room or no permission; the folder is as it was.
    """
    path = scalable_folder(folder) / CONFIG
    remove_parts(folder)
    sealed, before = check_seal(folder), path.read_bytes()
    config = {**parse_json(before, path), "scaling_factor": value}
    content = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if not sealed:
        write_atomically(path, content)
        return
    write_atomically(folder / BEFORE, before)
    try:
        write_atomically(path, content)
        seal(folder)
    except BaseException:
        _recover(folder)
        raise
    (folder / BEFORE).unlink()


def _recover(folder: Path) -> None:
    """Take the configuration back unless the folder was sealed with it."""
    try:
        check_seal(folder)
    except ValueError:
        (folder / BEFORE).replace(folder / CONFIG)
    else:
        (folder / BEFORE).unlink()
