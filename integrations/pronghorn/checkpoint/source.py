"""What a checkpoint is compared with: a folder, or a repository of the Hub that is fetched into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pronghorn.checkpoint import CONFIGS
from pronghorn.checkpoint.files import CODE, PICKLES

AS_SOURCE = "as the source"  # the finding of every comparison


class SourceError(ValueError):
    """The source cannot be had, which says nothing of the checkpoint that was to be compared with it."""


def source_folder(source: str) -> Path:
    """The folder of a source; of a repository all files but pickles and code.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        SourceError: it is neither, cannot be fetched, or has no configuration.
    """
    folder = Path(source) if Path(source).is_dir() else _fetched(source)
    if not any((folder / name).is_file() for name in CONFIGS):
        raise SourceError(f"--source: got {source!r}, which has no {' and no '.join(CONFIGS)}")
    return folder


@contextmanager
def read_as_source(source: str | Path) -> Iterator[None]:
    """What goes wrong inside is the source's fault, and not the checkpoint's.

    Raises:
        SourceError: in place of any error.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        raise SourceError(f"--source: {source} cannot be compared with: {reason}") from error


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, ignore_patterns=[f"*{suffix}" for suffix in sorted(PICKLES | CODE)]))
    except (ValueError, OSError) as error:  # names that are none, no such repository, no network
        reason = " ".join(str(error).split())[:300]
        raise SourceError(f"--source: got {source!r}, wanted a folder or a name on the Hub: {reason}") from error
