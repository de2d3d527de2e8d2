"""What a robot and a policy server tell each other: what the server serves, a request, a chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.remote.container import MessageError, pack, unpack
from pronghorn.vlash.remote.images import is_image, pack_images, unpack_images

DESCRIPTION, REQUEST, CHUNK = "description", "request", "chunk"
REQUEST_FIELDS = ("delay", "text", "jpeg")
SEEN, STATE, MEASURED, LEFTOVER, ACTIONS = "seen:", "state", "measured", "leftover", "actions"
LONGEST_DELAY = 10_000
DIMENSIONS = 8
DECODED_BYTES = 2**26  # that all JPEG images of a request may come to


@dataclass(frozen=True)
class Description:
    """What a server serves.

    Attributes:
        policy: its name.
        settings: how it was made to be run; its `async_mode` is the one that it computes for.
        state_dim: coordinates of the state.
        action_dim: coordinates of an action.
        inputs: names of what has to be in the content of an observation.
    """

    policy: str
    settings: VLASHSettings
    state_dim: int
    action_dim: int
    inputs: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """As a message."""
        header = {
            "policy": self.policy, "settings": self.settings.to_dict(), "state_dim": self.state_dim,
            "action_dim": self.action_dim, "inputs": list(self.inputs),
        }  # fmt: skip
        return pack(DESCRIPTION, header, {})

    @property
    def digest(self) -> str:
        """Tells it from any other."""
        return hashlib.sha256(self.pack()).hexdigest()

    @classmethod
    def unpack(cls, data: bytes) -> Description:
        """From a message.

        Raises:
            MessageError: it is none.
        """
        header, _ = unpack(data, DESCRIPTION, ("policy", "settings", "state_dim", "action_dim", "inputs"))
        inputs, sizes = header["inputs"], (header["state_dim"], header["action_dim"])
        named = isinstance(inputs, list) and _is_text(inputs) and isinstance(header["policy"], str)
        if not named or not all(type(size) is int and size > 0 for size in sizes):
            raise MessageError("description: its names are no text, or its sizes no numbers")
        try:
            settings = VLASHSettings.from_dict(header["settings"])
        except (ValueError, TypeError) as error:
            raise MessageError(f"settings: {error}") from error
        return cls(header["policy"], settings, *sizes, tuple(inputs))


def pack_request(request: ChunkRequest, jpeg_quality: int | None = None) -> bytes:
    """A request as a message.

    Args:
        request: the content of its observation is a mapping of names to tensors, arrays, texts or lists of texts.
        jpeg_quality: compress uint8 [..., height, width, 3] that much, 1 to 95; None leaves them as they are.

    Raises:
        MessageError: there is something else in the content.
    """
    if not isinstance(request.observation.content, Mapping):
        raise MessageError(f"content: got {type(request.observation.content).__name__}, wanted a mapping")
    text: dict[str, str | list[str]] = {}
    jpeg: dict[str, Any] = {}
    tensors = {STATE: request.state.float(), MEASURED: request.observation.state.float()}
    if request.leftover is not None:
        tensors[LEFTOVER] = request.leftover.float()
    for name, value in request.observation.content.items():
        if _is_text(value):
            text[name] = value
            continue
        tensor = _tensor(name, value)
        if jpeg_quality is not None and is_image(tensor):
            packed, tensor = pack_images(tensor, jpeg_quality)
            jpeg[name] = packed.to_dict()
        tensors[SEEN + name] = tensor
    # One tensor may be several of these; a file wants each by itself.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return pack(REQUEST, {"delay": request.delay, "text": text, "jpeg": jpeg}, tensors)


def unpack_request(data: bytes) -> ChunkRequest:
    """A request from a message; the content of its observation is a dict of tensors, texts and lists of texts.

    Raises:
        MessageError: it is none.
    """
    header, tensors = unpack(data, REQUEST, REQUEST_FIELDS)
    delay, text, jpeg = (header[name] for name in REQUEST_FIELDS)
    if type(delay) is not int or not 0 <= delay <= LONGEST_DELAY:
        raise MessageError(f"delay: got {delay!r}, wanted 0 to {LONGEST_DELAY}")
    if not isinstance(text, dict) or not all(map(_is_text, text.values())):
        raise MessageError("text: wanted texts, or lists of texts")
    if not isinstance(jpeg, dict):
        raise MessageError(f"jpeg: got {type(jpeg).__name__}, wanted an object")
    state, measured = _numbers(tensors, STATE), _numbers(tensors, MEASURED)
    leftover = _numbers(tensors, LEFTOVER) if LEFTOVER in tensors else None
    if measured.shape != state.shape:
        raise MessageError(f"measured: got {list(measured.shape)}, wanted {list(state.shape)}, as of the state")
    if leftover is not None and (leftover.dim() != state.dim() + 1 or leftover.shape[:-2] != state.shape[:-1]):
        raise MessageError(f"leftover: got {list(leftover.shape)} with a state of {list(state.shape)}")
    content, room = dict(text), DECODED_BYTES
    for name, tensor in tensors.items():
        if not name.startswith(SEEN) or name.removeprefix(SEEN) in text:
            raise MessageError(f"{name}: unknown, or there twice")
        key = name.removeprefix(SEEN)
        if key in jpeg:
            tensor = unpack_images(key, jpeg.pop(key), tensor, room)
            room -= tensor.numel()
        content[key] = tensor
    if jpeg:
        raise MessageError(f"jpeg: got {', '.join(jpeg)} without images")
    return ChunkRequest(Observation(content, measured), state, delay, leftover)


def pack_chunk(chunk: Tensor, seconds: float, digest: str) -> bytes:
    """A chunk as a message.

    Args:
        chunk: [..., chunk_size, action_dim].
        seconds: that it took.
        digest: of the description of what computed it.
    """
    return pack(CHUNK, {"seconds": seconds, "digest": digest}, {ACTIONS: chunk.float()})


def unpack_chunk(data: bytes) -> tuple[Tensor, float, str]:
    """What `pack_chunk` was given. The chunk may hold NaN: whoever executes it has to look.

    Raises:
        MessageError: it is none.
    """
    header, tensors = unpack(data, CHUNK, ("seconds", "digest"))
    if set(tensors) != {ACTIONS} or tensors[ACTIONS].dtype != torch.float32:
        raise MessageError(f"chunk: got {', '.join(tensors)}, wanted {ACTIONS} of float32")
    if not isinstance(header["seconds"], float) or not isinstance(header["digest"], str):
        raise MessageError("chunk: its seconds are no number, or its digest is no text")
    return tensors[ACTIONS], header["seconds"], header["digest"]


def _numbers(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Take finite float32 [..., n] out of a message's tensors."""
    if name not in tensors:
        raise MessageError(f"{name}: missing")
    value = tensors.pop(name)
    if value.dtype != torch.float32 or not 1 <= value.dim() <= DIMENSIONS or not value.isfinite().all():
        raise MessageError(f"{name}: got {value.dtype} {list(value.shape)}, wanted finite float32 [..., n]")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MessageError(f"{name}: got {type(value).__name__}, wanted a tensor, an array or text") from error
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype in (torch.uint8, torch.bool) else tensor.long()
