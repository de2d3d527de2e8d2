"""Autoencoders from wherever they are: official or diffusers' layout, ours or any other of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AutoModel

from pronghorn.dcae.config import DCAEConfig, published
from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC
from pronghorn.dcae.diffusers.plain_config import CLASS as PLAIN
from pronghorn.files.json_files import parse_json


def load_dcae(model: str | Path, *, config: DCAEConfig | str | None = None) -> AutoencoderDC:
    """A deep compression autoencoder in evaluation mode.

    Args:
        model: folder in the official layout or diffusers', official file, or hub name.
        config: the architecture, or the name of a published one, for an official file.

    Raises:
        ValueError: see `AutoencoderDC.from_efficientvit`.
    """
    if _is_official(Path(model)):
        return AutoencoderDC.from_efficientvit(model, config=config).eval()
    loaded: AutoencoderDC = AutoencoderDC.from_pretrained(model)
    return loaded.eval()


def start_dcae(model: str, *, config: str | None = None) -> AutoencoderDC:
    """An autoencoder to train: one that is there, or one with random weights.

    Args:
        model: as for `load_dcae`, a hub name with its owner; with random weights the bare name of a published one, or
            a JSON file of `DCAEConfig`.
        config: as for `load_dcae`.

    Raises:
        ValueError: nothing is there and nothing was published under the name, or see `load_dcae` and `DCAEConfig`.
    """
    path = Path(model)
    if starts_random(model) and path.exists():
        try:
            return AutoencoderDC(**DCAEConfig.from_dict(parse_json(path.read_bytes(), path)).to_dict())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
    if not starts_random(model):
        return load_dcae(model, config=config)
    # What was published is the scaling factor of other weights' latents.
    return AutoencoderDC(**replace(published(model), scaling_factor=1.0).to_dict())


def starts_random(model: str) -> bool:
    """Whether `start_dcae` takes an architecture of it, and no weights."""
    path = Path(model)
    return path.suffix == ".json" if path.is_file() else not path.exists() and "/" not in model


def load_autoencoder(model: str | Path, *, config: str | None = None) -> Any:
    """Any autoencoder for images, in evaluation mode; an `AutoencoderDC` as ours.

    Args:
        model: as for `load_dcae`, or folder or hub name of another class of diffusers.
        config: as for `load_dcae`.

    Raises:
        TypeError: it is no autoencoder.
    """
    if _is_official(Path(model)) or AutoencoderDC.load_config(model).get("_class_name") in (
        AutoencoderDC.__name__,
        PLAIN,
    ):
        return load_dcae(model, config=config)
    loaded = AutoModel.from_pretrained(str(model))  # of a Path it makes no id
    if not (hasattr(loaded, "encode") and hasattr(loaded, "decode")):
        raise TypeError(f"model: {model} is a {type(loaded).__name__}, wanted an autoencoder")
    return loaded.eval()


def _is_official(path: Path) -> bool:
    described = path / "config.json"
    return path.is_file() or (described.is_file() and "model_name" in parse_json(described.read_bytes(), described))
