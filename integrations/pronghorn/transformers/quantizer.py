"""What any quantization method needs of transformers' loading: registration and a look into the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from pronghorn.files.tensor_files import opened

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def register_method(name: str, config: type, quantizer: type[HfQuantizer], *, claim: bool = False) -> None:
    """Make `quant_method` `name` known to transformers; once more is a no-op.

    Args:
        name: value of `quant_method`.
        config: class of the configuration; `from_dict`, `to_dict` and `quant_method` are all that is asked of it.
        quantizer: class of the quantizer.
        claim: take the name over from whoever has it.

    Raises:
        ValueError: another quantizer has the name and `claim` is not set.
    """
    holder = AUTO_QUANTIZER_MAPPING.get(name)
    if holder is not None and holder is not quantizer and not claim:
        raise ValueError(f"quant_method {name!r} belongs to {holder.__name__}")
    # Not by transformers' decorators: they refuse names that are taken, and configurations without its base class.
    AUTO_QUANTIZER_MAPPING[name] = quantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[name] = config


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_tensors(files: Iterable[str] | None) -> dict[str, StoredTensor]:
    """What a checkpoint's files hold, by name, without reading their data.

    Raises:
        ValueError: a file that is truncated, or is none; or files of several folders, as an index may name them.
    """
    files = [str(path) for path in files or ()]
    folders = {Path(os.path.normpath(path)).parent for path in files}
    if len(folders) > 1:
        raise ValueError(f"{files[0]}: its index names files of other folders: {', '.join(map(str, sorted(folders)))}")
    found: dict[str, StoredTensor] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            content = pickled_tensors(path)
            found |= {name: StoredTensor(tuple(value.shape), value.dtype) for name, value in content.items()}
            continue
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is not None:
                    found[name] = StoredTensor(tuple(part.get_shape()), dtype)
    return found


def pickled_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The state dict in a file that torch saved; no code of it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: nothing that torch can read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: not a state dict")
    return content


def check_stored(module_name: str, expected: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if a module's stored tensors have another shape or kind than expected, or if there are more.

    Names that are not stored are passed over here: a checkpoint may name modules differently. `check_loaded` finds
    what was not loaded in the end.
    """
    prefix = f"{module_name}."
    extra = [name for name in stored if name.startswith(prefix) and name.removeprefix(prefix) not in expected]
    if extra:
        raise ValueError(f"{extra[0]}: the checkpoint has it, its configuration means {', '.join(expected)} only")
    for key, tensor in expected.items():
        found = stored.get(f"{module_name}.{key}")
        if found is None:
            continue
        if found.shape != tuple(tensor.shape):
            raise ValueError(
                f"{module_name}.{key}: the checkpoint has shape {found.shape}, "
                f"its configuration means {tuple(tensor.shape)}"
            )
        same_kind = found.dtype.is_floating_point == tensor.is_floating_point()
        if not same_kind or not (tensor.is_floating_point() or found.dtype == tensor.dtype):
            raise ValueError(
                f"{module_name}.{key}: the checkpoint has {found.dtype}, its configuration means {tensor.dtype}"
            )


def check_shapes(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if a tensor that a model has under the same name is of another shape, or no floating point."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = stored.get(name)
        if found is not None and (
            found.shape != tuple(tensor.shape) or found.dtype.is_floating_point != tensor.is_floating_point()
        ):
            raise ValueError(
                f"{name}: the checkpoint has {found.dtype} {found.shape}, its configuration means {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )


def check_loaded(model: nn.Module) -> None:
    """Raise ValueError naming tensors that the checkpoint did not have (transformers made them up), or NaN and Inf."""
    missing = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        raise ValueError(
            f"the checkpoint of {type(model).__name__} lacks {len(missing)} tensors, such as {missing[0]!r}"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: holds NaN or Inf")


def tokenizer_of(model: Any) -> Any:
    """The tokenizer saved beside a model, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        return None
