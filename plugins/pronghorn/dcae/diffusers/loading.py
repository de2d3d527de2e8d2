"""Autoencoders from wherever they are: official or diffusers' layout, ours or any other of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AutoModel
from huggingface_hub import hf_hub_download

from pronghorn.dcae.config import DCAEConfig, published
from pronghorn.dcae.diffusers.autoencoder import WEIGHTS, AutoencoderDC
from pronghorn.dcae.diffusers.plain_config import CLASS as PLAIN
from pronghorn.files.json_files import parse_json

CONFIG = "config.json"


def load_dcae(model: str | Path, *, config: DCAEConfig | str | None = None) -> AutoencoderDC:
    """A deep compression autoencoder in evaluation mode.

    Args:
        model: folder in the official layout or diffusers', official file, or hub name.
        config: the architecture, or the name of a published one, for an official file.

    Raises:
        ValueError: see `AutoencoderDC.from_efficientvit`.
        FileNotFoundError: there is no such folder, file or hub name.
    """
    official = _official(model)
    if official is not None:
        return AutoencoderDC.from_efficientvit(official, config=config).eval()
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
        FileNotFoundError: see `load_dcae`.
    """
    if _official(model) is not None or AutoencoderDC.load_config(model).get("_class_name") in (
        AutoencoderDC.__name__,
        PLAIN,
    ):
        return load_dcae(model, config=config)
    loaded = AutoModel.from_pretrained(str(model))  # of a Path it makes no id
    if not (hasattr(loaded, "encode") and hasattr(loaded, "decode")):
        raise TypeError(f"model: {model} is a {type(loaded).__name__}, wanted an autoencoder")
    return loaded.eval()


def _official(model: str | Path) -> Path | None:
    """File or folder in the official layout, from the hub where it is not here; None for one in diffusers' layout.

    Raises:
        FileNotFoundError: it is neither here nor there.
    """
    path = Path(model)
    if path.exists():
        return path if path.is_file() or _names_model(path / CONFIG) else None
    name = str(model)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # which no hub name is
        raise FileNotFoundError(f"model: no such folder or file: {name}")
    try:
        if not _names_model(Path(hf_hub_download(name, CONFIG))):
            return None
        return Path(hf_hub_download(name, WEIGHTS)).parent
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model: no such folder or file: {name}; nor does the hub give one: {error}") from error


def _names_model(described: Path) -> bool:
    return described.is_file() and "model_name" in parse_json(described.read_bytes(), described)
