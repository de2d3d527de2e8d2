"""The progress of a calibration on disk: finished blocks, and a fingerprint that says of which run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

SAMPLED_ELEMENTS = 1 << 16


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

    Raises:
        ValueError: the directory belongs to a run whose fingerprint differs; the fields are named.
    """

    def __init__(self, directory: Path | None, fingerprint: Callable[[], dict[str, Any]]) -> None:
        self.directory = directory
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path, found = directory / "fingerprint.json", fingerprint()
        if not path.exists():
            _write_atomically(path, json.dumps(found, indent=1).encode())
            return
        stored = json.loads(path.read_text())
        found = json.loads(json.dumps(found))
        differing = sorted(key for key in stored.keys() | found.keys() if stored.get(key) != found.get(key))
        if differing:
            raise ValueError(
                f"{directory} holds the state of another run; these differ: {', '.join(differing)}. "
                "Use another directory, or delete this one"
            )

    def load(self, index: int) -> BlockResult | None:
        """The saved result of a block, if there is one."""
        path = self._path(index)
        if path is None or not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
            return BlockResult({key: file.get_tensor(key) for key in file.keys()}, info)  # noqa: SIM118

    def save(self, index: int, result: BlockResult) -> None:
        """Keep the result of a block."""
        path = self._path(index)
        if path is not None:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in result.tensors.items()}
            _write_atomically(path, save(tensors, metadata={"info": json.dumps(result.info)}))

    def _path(self, index: int) -> Path | None:
        return None if self.directory is None else self.directory / f"block-{index:05d}.safetensors"


def fingerprint_of(model: nn.Module, samples: Sequence[Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two runs to give the same results bit by bit: weights, data, settings, code.

    Of each weight a sample of its bytes is hashed, so that a large model takes seconds.
    """
    import transformers

    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].cpu().contiguous()
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(part.view(torch.uint8).numpy().tobytes())
    data = hashlib.sha256()
    for ids in samples:
        data.update(f"{tuple(ids.shape)}".encode() + ids.cpu().contiguous().numpy().tobytes())
    return {
        "weights": weights.hexdigest(),
        "data": data.hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **settings,
    }


def _write_atomically(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
