"""Files that are there whole or not at all, with errors that say how much room was needed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pronghorn.files.room import told_of_room

PART = ".part"  # ends the name of a file that is being written


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, after a kill or a power loss too.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    written = write_part(path.parent, path.name, content)
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


def write_part(directory: Path, name: str, content: bytes | memoryview, *, sync: bool = True) -> Path:
    """Write a file under a name of its own, for the caller to rename.

    Args:
        directory: where.
        name: what it will be called; the name it has is made from it and ends with `PART`.
        content: of the file.
        sync: wait until it is on disk.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    with told_of_room(directory / name, len(content)):
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=PART)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return Path(temporary)


def remove_parts(directory: Path) -> None:
    """Remove what a killed run was writing."""
    for path in directory.glob(f".*{PART}"):
        path.unlink(missing_ok=True)
