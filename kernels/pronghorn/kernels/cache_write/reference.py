"""Definition of writing tokens to slots."""

from __future__ import annotations

from torch import Tensor


def cache_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """In place."""
    written = slots >= 0
    page, inner = slots[written] // key_cache.shape[2], slots[written] % key_cache.shape[2]
    key_cache[page, :, inner] = key[written]
    value_cache[page, :, inner] = value[written]
