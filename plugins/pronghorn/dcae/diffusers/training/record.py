"""What a training was given, kept in its folder: so that it does not go on with something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pronghorn.dcae.digests import LENGTH, digest_of_weights
from pronghorn.files.atomic import write_atomically
from pronghorn.files.json_files import differing, parse_json
from pronghorn.versions import code_of, versions

CONFIG = "config.json"
MADE_FROM = "made_from"  # beside the settings; trainings of before have none
# Settings that may differ when training goes on.
FREE = ("steps", "evaluate_every", "save_every", "workers", "mixed_precision", "gradient_checkpointing")


def made_from(model: Any, data: str, classes: list[str] | None = None) -> dict[str, Any]:
    """What a training is made from, beside its settings: with the code and library versions that run it.

    Args:
        model: a model of diffusers, before its first step.
        data: digest of what it is trained on.
        classes: names of what it is trained to tell apart, in the order of their numbers.
    """
    architecture = {name: value for name, value in model.config.items() if not name.startswith("_")}
    found = {
        "architecture": architecture, "weights": digest_of_weights(model), "data": data,
        "code": code_of(type(model), made_from, digest_of_weights)[:LENGTH],
        **versions(("torch", "diffusers", "accelerate", "pronghorn")),
    }  # fmt: skip
    return found if classes is None else {**found, "classes": classes}


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote, and nothing if it did not.

    Raises:
        ValueError: there is something else.
    """
    path = folder / CONFIG
    if not path.exists():
        return {}
    found = parse_json(path.read_bytes(), path)
    if not isinstance(found, dict) or not isinstance(found.get(MADE_FROM, {}), dict):
        raise ValueError(f"{path}: got {type(found).__name__}, wanted the settings of a training")
    return found


def write_record(folder: Path, settings: dict[str, Any], origin: dict[str, Any]) -> None:
    """Keep what a training was given, unless that was done before."""
    if not (folder / CONFIG).exists():
        write_atomically(folder / CONFIG, (json.dumps({**settings, MADE_FROM: origin}, indent=1) + "\n").encode())


def check_record(folder: Path, settings: dict[str, Any], origin: dict[str, Any], usual: dict[str, Any]) -> None:
    """Raise ValueError, with the names of what differs, if a folder holds a training that was given something else.

    Args:
        folder: of the training.
        settings: of the one that is to go on.
        origin: what that is made from, see `made_from`.
        usual: defaults of settings. A record from before there was a setting lacks it: its default is what was done.
    """
    found = read_record(folder)
    if not found:
        return
    # What it lacks of this is not compared: older ones do, and users take out what they change on purpose.
    before = found.pop(MADE_FROM, {})
    names = sorted({*found, *settings} - {*FREE})
    were = {name: found.get(name, usual.get(name)) for name in names}
    other = differing(were, {name: settings.get(name) for name in names})
    changed = differing(_flat(before), _flat(origin))
    if other or changed:
        remedy = f". To go on nevertheless, take it out of {MADE_FROM!r} in {folder / CONFIG}" if changed else ""
        raise ValueError(f"output: {folder} holds a training with other settings: {'; '.join(other + changed)}{remedy}")


def _flat(origin: dict[str, Any]) -> dict[str, Any]:
    architecture = origin.get("architecture", {})
    inside = {f"architecture.{name}": value for name, value in architecture.items()}
    return {name: value for name, value in origin.items() if name != "architecture"} | inside
