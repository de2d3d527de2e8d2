"""A process that may map only so much more memory than it has."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Allocations of this process beyond `size` more bytes fail: MemoryError, or RuntimeError from torch.

    For a child process: a library that does not expect it may end the process.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
