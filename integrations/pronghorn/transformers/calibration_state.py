"""The progress of a calibration on disk: finished blocks, and a fingerprint that says of which run."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.files.atomic import remove_parts
from pronghorn.files.json_files import load_json, parse_json, save_json
from pronghorn.files.tensor_files import load_tensors, opened, save_tensors
from pronghorn.versions import versions

FORMAT = 2  # of both kinds of files
SAMPLED_ELEMENTS = 1 << 16
UNIMPORTANT = ("_name_or_path", "transformers_version", "quantization_config")  # of a model's configuration


@dataclass
class BlockResult:
    """What a search found for one block: tensors, and anything that JSON holds."""

    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)


class CalibrationState:
    """Finished blocks in a directory, one file each, written atomically.

    Args:
        directory: made if it does not exist; None keeps nothing.
        fingerprint: makes the run's fingerprint, when it is needed.
        anew: give up what runs have kept there.

    Raises:
        ValueError: the directory belongs to a run whose fingerprint differs (the fields are named), or is damaged.
        OSError: the directory cannot be written.
    """

    def __init__(
        self, directory: Path | None, fingerprint: Callable[[], dict[str, Any]], *, anew: bool = False
    ) -> None:
        self.directory = directory
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        remove_parts(directory)
        path = directory / "fingerprint.json"
        found = json.loads(json.dumps(fingerprint()))
        if anew:
            forget(directory)
        if not path.exists():
            save_json(path, found, format=FORMAT)
            return
        try:
            stored = dict(load_json(path, newest=FORMAT))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {directory} to start anew") from error
        differing = _differences(stored, found)
        if differing:
            raise ValueError(
                f"{directory} holds the state of another run; these differ: {', '.join(differing)}. "
                "Use another directory, or delete this one (commands: --force)"
            )

    def load(self, index: int, device: torch.device) -> tuple[BlockResult, int] | None:
        """The saved result of a block and the halvings of its chunks, if it was saved.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(index)
        if path is None or not path.exists():
            return None
        try:
            tensors, notes = load_tensors(path, newest=FORMAT)
            if notes is None:  # of format 1
                with opened(path) as file:
                    notes = parse_json((file.metadata() or {})["notes"], path)
            result = BlockResult({key: tensor.to(device) for key, tensor in tensors.items()}, dict(notes["info"]))
            return result, int(notes["halvings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and its block is searched again") from error

    def save(self, index: int, result: BlockResult, halvings: int) -> None:
        """Keep the result of a block, and how often its chunks were halved."""
        path = self._path(index)
        if path is not None:
            save_tensors(path, result.tensors, format=FORMAT, notes={"info": result.info, "halvings": halvings})

    def _path(self, index: int) -> Path | None:
        return None if self.directory is None else self.directory / f"block-{index:05d}.safetensors"


def fingerprint_of(
    model: Any, samples: Iterable[Tensor], settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """What must be equal for two runs to give the same results bit by bit: model, data, settings, device, code.

    Of each weight a sample of its bytes is hashed, so that a large model takes seconds.
    """
    weights = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].cpu().contiguous()
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(part.view(torch.uint8).numpy().tobytes())
    data = hashlib.sha256()
    for ids in samples:
        data.update(f"{tuple(ids.shape)}".encode() + ids.cpu().contiguous().numpy().tobytes())
    config = {key: value for key, value in model.config.to_dict().items() if key not in UNIMPORTANT}
    return {
        "config": json.loads(json.dumps(config, default=str)),
        "attn_implementation": str(model.config._attn_implementation),
        "weights": weights.hexdigest(),
        "data": data.hexdigest(),
        "device": device.type,
        **versions(("torch", "transformers", "pronghorn")),
        **settings,
    }


def forget(directory: Path) -> None:
    """Remove what runs have kept in a directory, and nothing else."""
    for pattern in ("fingerprint.json", "block-*.safetensors"):
        for path in directory.glob(pattern):
            path.unlink()


def _differences(stored: Any, found: Any, name: str = "") -> list[str]:
    """The names of fields, dotted, that are not equal in two JSON objects."""
    if not (isinstance(stored, dict) and isinstance(found, dict)):
        return [] if stored == found else [name]
    missing = object()
    return [
        difference
        for key in sorted(stored.keys() | found.keys())
        for difference in _differences(stored.get(key, missing), found.get(key, missing), f"{name}.{key}".strip("."))
    ]
