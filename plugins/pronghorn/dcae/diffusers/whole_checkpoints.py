"""Checkpoints of diffusers' models that are sealed when they are written, and loaded whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from torch import nn

from pronghorn.files.sealed import WEIGHTS, check_seal, seal
from pronghorn.files.tensor_files import opened

LARGEST = 1024


class WholeCheckpoints:
    """Stands before diffusers' `ModelMixin`, whose loading makes up what a checkpoint lacks and only warns of it."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As diffusers does; the folder is sealed when all is there."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", args[0] if args else True):
            seal(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As diffusers does.

        Raises:
            ValueError: weights are missing, unknown, of another shape or not finite, or the folder is not as sealed.
        """
        path = pretrained_model_name_or_path
        folder = Path(path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_seal(folder)
        asked = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except (SafetensorError, RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder}: cannot be loaded as {cls.__name__}: {error}") from error
        wrong = [f"{len(names)} {kind} ({names[0]})" for kind, names in _wrong(info).items() if names]
        if wrong:
            raise ValueError(f"{folder}: weights of {cls.__name__}: {', '.join(wrong)}")
        _check_kinds(model, folder)
        check_numbers(model, folder)
        loaded: Any = (model, info) if asked else model
        return loaded


def _check_kinds(model: nn.Module, folder: Path) -> None:
    """Refuse integers for weights, of which diffusers makes numbers."""
    own = model.state_dict()
    for path in sorted(folder.glob(WEIGHTS)):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                dtype = file.get_slice(key).get_dtype()
                if key in own and own[key].is_floating_point() != ("F" in dtype):
                    raise ValueError(f"{path}: {key}: got {dtype}, wanted {own[key].dtype}")


def check_numbers(model: nn.Module, name: object) -> None:
    """Raise ValueError if a weight of a model, loaded from a file of this name, cannot be right."""
    for key, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: {key}: holds NaN or Inf")
        if key.endswith(".running_var") and bool((tensor < 0).any()):
            raise ValueError(f"{name}: {key}: holds negative variances")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a number of blocks, heads or places that no model has, before a computer is asked for it."""
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise ValueError(f"{name}: got {size!r}, wanted 1 to {LARGEST}")


def _wrong(info: dict[str, Any]) -> dict[str, list[str]]:
    kinds = {"are missing": "missing_keys", "are unknown": "unexpected_keys", "have another shape": "mismatched_keys"}
    return {kind: sorted(map(str, info.get(key) or ())) for kind, key in kinds.items()}
