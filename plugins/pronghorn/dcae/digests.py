"""What something was made from, in digests: weights, and the files that were read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

LENGTH = 16  # letters of a digest


def digest_of_weights(module: nn.Module) -> str:
    """Of all names, types, shapes and numbers, wherever the module lies."""
    made = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        made.update(flat.view(torch.uint8).numpy().data)
    return made.hexdigest()[:LENGTH]


def digest_of_files(paths: Sequence[Path], folder: Path | None = None) -> str:
    """Of names, in the folder if there is one, and sizes: contents would take as long to read as a turn of training."""
    return digest([(str(path.relative_to(folder) if folder else path), path.stat().st_size) for path in paths])


def digest(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:LENGTH]
