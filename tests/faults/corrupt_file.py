"""Files as disks, networks and strangers damage them: hostile headers, a flipped bit, a lost end."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save

LENGTH = 8  # bytes before the header of a safetensors file, which tell its length
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4242\n"
PAGE = b"<!DOCTYPE html><html><body>404: there is no such file</body></html>\n"


def parts(content):
    """Header and payload of a safetensors file."""
    length = int.from_bytes(content[:LENGTH], "little")
    return json.loads(content[LENGTH : LENGTH + length]), content[LENGTH + length :]


def whole(header, payload):
    """A safetensors file with that header, an object or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(LENGTH, "little") + text + payload


def _header(change):
    """An attack that changes what the header says of the last tensor that has a payload."""

    def attack(content):
        header, payload = parts(content)
        names = [name for name, about in header.items() if name != "__metadata__" and _size(about)]
        last = max(names, key=lambda name: header[name]["data_offsets"][1])
        change(header, last)
        return whole(header, payload)

    return attack


def _size(about):
    return about["data_offsets"][1] - about["data_offsets"][0]


def _moved(by):
    def change(header, name):
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

    return change


ATTACKS = {
    "empty": lambda content: b"",
    "length beyond any file": lambda content: (2**63).to_bytes(LENGTH, "little") + content[LENGTH:],
    "length beyond this file": lambda content: (len(content) + 1).to_bytes(LENGTH, "little") + content[LENGTH:],
    "header is no JSON": lambda content: whole(b"{" * 40, parts(content)[1]),
    "header is a list": lambda content: whole(b"[1, 2]", parts(content)[1]),
    "header nested deep": lambda content: whole(b"[" * 100_000, parts(content)[1]),
    "header is no UTF-8": lambda content: whole(b'{"\xff\xfe": 1}', parts(content)[1]),
    "LFS pointer": lambda content: POINTER,
    "HTML page": lambda content: PAGE,
    "payload cut": lambda content: content[:-1],
    "payload with a tail": lambda content: content + b"\0" * 8,
    "overlapping tensors": _header(_moved(-1)),
    "hole between tensors": _header(_moved(1)),
    "shape beyond the payload": _header(lambda header, name: header[name].update(shape=[2**20, 2**20])),
    "shape that overflows": _header(lambda header, name: header[name].update(shape=[2**63, 2**63])),
    "unknown dtype": _header(lambda header, name: header[name].update(dtype="F33")),
}


class CorruptFile:
    """Damages a file in place, again and again from what it was.

    Args:
        path: of the file.
        seed: of what is drawn.

    Attributes:
        count: how often the file has been made another.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.path, self.count = path, 0
        self.clean = path.read_bytes()
        self._random = random.Random(seed)  # noqa: S311 - no secret

    def attack(self, name: str) -> None:
        """One of `ATTACKS`; where the file holds no safetensors, a file that does takes its place first."""
        held = self.clean if self.path.suffix == ".safetensors" else save({"a": torch.ones(4), "b": torch.ones(3)})
        self._write(ATTACKS[name](held))

    def flip(self) -> int:
        """Flip one bit anywhere; returns the byte's place."""
        place = self._random.randrange(len(self.clean))
        damaged = bytearray(self.clean)
        damaged[place] ^= 1 << self._random.randrange(8)
        self._write(bytes(damaged))
        return place

    def cut(self) -> int:
        """Keep only the beginning; returns its length."""
        length = self._random.randrange(len(self.clean))
        self._write(self.clean[:length])
        return length

    def restore(self) -> None:
        """The file as it was."""
        self.path.write_bytes(self.clean)

    def _write(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.count += content != self.clean
