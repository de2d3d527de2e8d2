"""Triton kernel that writes tokens to slots: a program copies one token's key and value of one head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write(
    key, value, key_cache, value_cache, slots, page_size,
    key_token, key_head, value_token, value_head,
    key_page, key_cache_head, key_slot, value_page, value_cache_head, value_slot,
    KEY: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDTH)
    slot = tl.load(slots + token)
    if slot >= 0:
        page, inner = slot // page_size, slot % page_size
        k = tl.load(key + token * key_token + head * key_head + d, mask=d < KEY)
        v = tl.load(value + token * value_token + head * value_head + d, mask=d < VALUE)
        tl.store(key_cache + page * key_page + head * key_cache_head + inner * key_slot + d, k, mask=d < KEY)
        tl.store(value_cache + page * value_page + head * value_cache_head + inner * value_slot + d, v, mask=d < VALUE)


def cache_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """In place."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.stride(-1) != 1:
            raise ValueError(f"{name}: got strides {cache.stride()}, wanted a last one of 1")
    key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (key, value))
    sizes = key.shape[2], value.shape[2]
    _write[(key.shape[0], key.shape[1])](
        key, value, key_cache, value_cache, slots.contiguous(), key_cache.shape[2],
        *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
        *sizes, triton.next_power_of_2(max(sizes)), num_warps=1,
    )  # fmt: skip
