"""Files of a calibration: written atomically or mapped without a name, with errors that say what was needed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PART = ".part"  # ends the name of a file that is being written


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError unless `needed` bytes are free in `directory`."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{directory}: {needed} bytes are needed, {free} bytes are free")


def remove_parts(directory: Path) -> None:
    """Remove what a killed run was writing."""
    for path in directory.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, after a kill or a power loss too.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    written = _write(path.parent, path.name, content)
    try:
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name is on disk only once its directory is.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def mapped_copy(tensor: Tensor, directory: Path) -> Tensor:
    """A copy of a tensor in a memory-mapped file that has no name, so that the end of the process removes it.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    content = tensor.detach().cpu().contiguous()
    # Written, not only mapped: a page that finds no room on the disk would end the process with SIGBUS.
    array: Any = content.view(-1).view(torch.uint8).numpy()
    path = _write(directory, "activations", memoryview(array), sync=False)
    try:
        return torch.from_file(str(path), shared=True, size=content.numel(), dtype=content.dtype).view(content.shape)
    finally:
        path.unlink()


def _write(directory: Path, name: str, content: bytes | memoryview, *, sync: bool = True) -> Path:
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=PART)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        free = shutil.disk_usage(directory).free
        reason = f"{error.strerror}: {len(content)} bytes are needed, {free} bytes are free"
        raise OSError(error.errno, reason, str(directory / name)) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Path(temporary)
