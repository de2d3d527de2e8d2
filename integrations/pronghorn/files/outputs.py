"""Where a command is to write its result: checked before the work, which may take hours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def check_output(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raise ValueError unless a file can be written there.

    Args:
        option: whose value it is, for errors.
        path: of the file; None, for an option that was not given, is fine.
        suffixes: that its name may have; none for any.
    """
    if path is None:
        return
    folder = path.parent
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option}: got {str(path)!r}, wanted a name that ends with {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{option}: got {str(path)!r}, which is a folder; wanted a file")
    if not folder.is_dir():
        raise ValueError(f"{option}: got {str(path)!r}, wanted a file in a folder that is there; {folder} is not")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: got {str(path)!r}, wanted a folder that can be written to")
