"""Safetensors of our own: each says in which format it is, and carries a digest of what it holds.

Safetensors take a flipped bit in a number for another number; the digest, a sha256 in the metadata, does not. Files
without one, those of other programs and of Pronghorn before it wrote digests, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pronghorn.files.atomic import write_atomically
from pronghorn.files.json_files import DIGEST, FORMAT, check_format, damaged, parse_json

KEY = "pronghorn"  # of the metadata; a single entry, since safetensors writes several in any order


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, format: int, notes: Any = None) -> None:
    """Write safetensors, whole or not at all, with their format and digest.

    Args:
        path: of the file.
        tensors: by name.
        format: its number.
        notes: anything that JSON holds.

    Raises:
        OSError: no room or no permission; what was there is as it was.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(held, metadata=marked(held, format=format, notes=notes)))


def marked(tensors: Mapping[str, Tensor], *, format: int, notes: Any = None) -> dict[str, str]:
    """Metadata of a safetensors file that holds exactly these tensors: format, digest and notes."""
    held = json.loads(json.dumps(notes))
    mark = {FORMAT: format, DIGEST: digest_of(tensors, held, format), "notes": held}
    return {KEY: json.dumps(mark)}


def load_tensors(path: Path, *, newest: int) -> tuple[dict[str, Tensor], Any]:
    """Tensors and notes that `save_tensors` wrote; or any safetensors that have no digest, as they are, and None.

    Args:
        path: of the file.
        newest: the format that `save_tensors` writes today; older ones are read too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its format is newer.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if KEY not in metadata:
        return tensors, None
    mark = parse_json(metadata[KEY], path)
    if not isinstance(mark, dict):
        raise ValueError(damaged(path))
    check_format(mark.get(FORMAT), path, newest)
    if mark.get(DIGEST) != digest_of(tensors, mark.get("notes"), mark[FORMAT]):
        raise ValueError(damaged(path))
    return tensors, mark.get("notes")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of any safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


class opened:  # noqa: N801 - used as a function
    """`safe_open` on the CPU, whose errors name the file: `with opened(path) as file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file, also where that shows only when a tensor is asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file: Any = None

    def __enter__(self) -> _Named:
        if not Path(self._path).is_file():
            raise FileNotFoundError(f"{self._path}: there is no such file")
        with _naming(self._path):
            self._file = safe_open(self._path, framework="pt")
            return _Named(self._path, self._file.__enter__())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)


class _Named:
    """An open file of safetensors, whose errors name it; those of other files in the same block are none of its."""

    def __init__(self, path: str | os.PathLike[str], file: Any) -> None:
        self._path = path
        self._file = file

    def keys(self) -> list[str]:
        return self._file.keys()

    def metadata(self) -> dict[str, str] | None:
        return self._file.metadata()

    def get_tensor(self, name: str) -> Tensor:
        with _naming(self._path):
            return self._file.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        with _naming(self._path):
            return self._file.get_slice(name)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def digest_of(tensors: Mapping[str, Tensor], notes: Any, format: int) -> str:
    """A sha256 of tensors (their names, dtypes, shapes and bytes), of notes and of the format's number."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(tensors, pool.map(_digest_of_tensor, tensors.values()), strict=True))
    lines = [f"{format} {json.dumps(notes, sort_keys=True)}", *(f"{name} {found[name]}" for name in sorted(found))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_of_tensor(tensor: Tensor) -> str:
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(memoryview(content))
    return found.hexdigest()
