"""What a message is: a safetensors file, whose metadata hold a JSON object. Reading one runs no code of the sender."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

VERSION = 2
METADATA, KEY, CHECKSUM = "__metadata__", "vlash", "crc32"
LENGTH_BYTES, HEADER_BYTES, TENSORS = 8, 2**20, 64
DTYPES = (torch.float32, torch.uint8, torch.int64, torch.bool)


class MessageError(ValueError):
    """A message is not what it has to be."""


class VersionError(MessageError):
    """The other side speaks another version."""


def pack(kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """A message.

    Args:
        kind: what it is.
        header: for JSON.
        tensors: by name; of `DTYPES`.

    Raises:
        MessageError: a tensor has another dtype, or there are too many.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    if len(tensors) > TENSORS:
        raise MessageError(f"message: got {len(tensors)} tensors, wanted at most {TENSORS}")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = {"version": VERSION, "kind": kind, **header}
    return save(held, {KEY: json.dumps({**said, CHECKSUM: _checksum(said, held)})})


def unpack(data: bytes, kind: str, fields: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a message.

    Args:
        data: the message.
        kind: that it has to be.
        fields: of its header, exactly.

    Raises:
        VersionError: it is of another version.
        MessageError: it is no message, of another kind, or has other fields.
    """
    header = _json(_metadata(data))
    checksum, said = header.pop(CHECKSUM, None), dict(header)
    version = header.pop("version", None)
    if version != VERSION:
        raise VersionError(f"version: got {version!r}, wanted {VERSION}; run the same Pronghorn on both machines")
    found = header.pop("kind", None)
    if found != kind:
        raise MessageError(f"kind: got {found!r}, wanted {kind!r}")
    if set(header) != set(fields):
        raise MessageError(f"header: got {', '.join(sorted(header))}, wanted {', '.join(sorted(fields))}")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:
        raise MessageError(f"message: no safetensors file that can be read, {error}") from error
    if len(tensors) > TENSORS:
        raise MessageError(f"message: got {len(tensors)} tensors, wanted at most {TENSORS}")
    for name, tensor in tensors.items():
        _check(name, tensor)
    if checksum is not None and checksum != _checksum(said, tensors):
        raise MessageError("message: damaged on its way: it is not what its checksum says")
    return header, tensors


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all that a message says."""
    found = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        content: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode(), found)
        found = zlib.crc32(memoryview(content), found)
    return found


def _metadata(data: bytes) -> str:
    """The text that a safetensors file holds for us; its library gives that of files on disk only."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length > min(HEADER_BYTES, len(data) - LENGTH_BYTES):
        raise MessageError(f"message: got {len(data)} bytes that are no safetensors file, or one with a long header")
    metadata = _json(data[LENGTH_BYTES : LENGTH_BYTES + length]).get(METADATA)
    if not isinstance(metadata, dict) or set(metadata) != {KEY} or not isinstance(metadata[KEY], str):
        raise MessageError(f"message: its metadata are not {KEY!r} alone")
    return metadata[KEY]


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"header: no JSON, {error}") from error
    if not isinstance(value, dict):
        raise MessageError(f"header: got {type(value).__name__}, wanted an object")
    return value


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES or not tensor.numel():
        raise MessageError(
            f"{name}: got {tensor.dtype} {list(tensor.shape)}, wanted some values of {', '.join(map(str, DTYPES))}"
        )
