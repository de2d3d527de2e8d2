"""Folders of ours that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pronghorn.files.room import check_target, told_of_room


@contextmanager
def made_whole(target: Path, *, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that takes the target's name at the end, once it is on disk, or goes away.

    Args:
        target: the folder to make.
        needed: bytes that it will hold, about.
        overwrite: replace a folder that is there.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    if target.is_symlink():
        target = target.resolve()
    check_target(target, needed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with told_of_room(target, needed):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o755)
            for path in (*folder.rglob("*"), folder):
                _wait_for_disk(path)
            old = target.with_name(f".{target.name}.replaced")
            _take_name(folder, target, old if overwrite and target.exists() else None)
            _wait_for_disk(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _take_name(folder: Path, target: Path, old: Path | None) -> None:
    """Rename a folder; the one that is there is called `old` from then on, or stays where that fails."""
    if old is None:
        folder.rename(target)
        return
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed when its new folder was there already
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _wait_for_disk(path: Path) -> None:
    """Have a file, or the names in a folder, survive a loss of power."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
