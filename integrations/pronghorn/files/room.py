"""Room for what will be written: looked for before work starts, and spoken of by the errors where it ran out."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT_OF_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# safetensors and tokenizers, written in Rust, raise errors of their own: the system's is but told of in their text.
_TOLD = re.compile(r"\(os error (\d+)\)")
# `torch.save`, written in C++, tells of no number.
_OF_TORCH = re.compile(r"iostream error|inline_container.* unexpected pos|PytorchStreamWriter failed")


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError unless `needed` bytes are free in `directory`."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise no_room(errno.ENOSPC, directory, needed)


def check_target(target: Path, needed: int = 0) -> None:
    """Try whether a file or folder can be made at a path, as a command should before its work; nothing stays there.

    Args:
        target: it and folders above it need not exist.
        needed: bytes that must be free, as far as they are known.

    Raises:
        OSError: it cannot be made, or there is no room.
    """
    above = target.absolute().parents
    place = next(folder for folder in above if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot be made, {place} takes no file: {error.strerror}", str(target)) from error
    check_room(place, needed)


def no_room(number: int, path: Path, needed: int) -> OSError:
    """The error to raise where the system's, of this number, came up while so many bytes were written."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    return OSError(number, f"{os.strerror(number)}: {needed} bytes are needed, {free} bytes are free", str(path))


@contextmanager
def told_of_room(path: Path, needed: int) -> Iterator[None]:
    """A block that writes; where its room runs out, the error says how much it is in all, and how much is free.

    Raises:
        OSError: no room; also where a library raised an error that is none.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in OUT_OF_ROOM:
            raise
        raise no_room(error.errno, path, needed) from error
    except Exception as error:
        if _OF_TORCH.search(str(error)):
            raise no_room(errno.EIO, path, needed) from error
        told = _TOLD.search(str(error))
        number = int(told[1]) if told else 0
        if not number:
            raise
        if number not in OUT_OF_ROOM:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise no_room(number, path, needed) from error
