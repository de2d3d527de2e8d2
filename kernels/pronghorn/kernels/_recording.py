"""What recording a CUDA graph needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_freed() -> Iterator[None]:
    """No cycles are collected: an older graph among them would be freed, which breaks off a recording."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
