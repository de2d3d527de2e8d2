"""A checkpoint's folder with all that belongs to it: weights, report, model card and seal, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pronghorn.checkpoint import REPORT
from pronghorn.files.sealed import SEALED, seal
from pronghorn.files.whole_folders import made_whole


def write_checkpoint(
    target: Path,
    save: Callable[[Path], object],
    *,
    needed: int,
    report: Callable[[Path], str | None] | None = None,
    sealed: Iterable[str] = SEALED,
    overwrite: bool = False,
    in_spite_of: tuple[type[Exception], ...] = (),
) -> str | None:
    """Write a checkpoint, then its report, then its seal; the folder has its name when it has them all.

    Args:
        target: the folder to make.
        save: writes the checkpoint into a folder.
        needed: bytes that it will hold, about.
        report: writes the report into that folder; gives what it says, in a line.
        sealed: see `seal`; the report is sealed too, the model card is the user's to edit.
        overwrite: replace a folder that is there.
        in_spite_of: errors of the report that are raised when the folder is there without it, to be looked at: making
            the checkpoint may have taken hours.

    Returns:
        What the report says; None without one.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    said = failure = None
    with made_whole(target, needed=needed, overwrite=overwrite) as folder:
        save(folder)
        try:
            said = None if report is None else report(folder)
        except in_spite_of as error:
            failure = error
        seal(folder, (*sealed, REPORT))
    if failure is not None:
        raise failure
    return said
