"""What vLLM's cache managers say of a prefix that is cached, which versions say differently."""

from __future__ import annotations

from typing import Any


def blocks_of_hit(hit: Any) -> tuple[list[Any], ...]:
    """The lists of blocks, one for each group, in what `find_longest_cache_hit` returns."""
    blocks: tuple[list[Any], ...] = hit if isinstance(hit[-1], list) else hit[0]  # newer versions add a length
    return blocks
