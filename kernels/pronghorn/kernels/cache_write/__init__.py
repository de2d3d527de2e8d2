"""Writes keys and values of tokens to slots of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.cache_write import reference

__all__ = ["cache_write"]


def cache_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write each token to slot `slots % page size` of page `slots // page size`, in place.

    A cache that is not in pages has one page a sequence. Slots of tokens must differ; that they lie in the cache is
    checked on the CPU alone, where it waits for nothing. Nothing is differentiable.

    Args:
        key: [tokens, heads, head_dim], floating point.
        value: [tokens, heads, value's head_dim].
        key_cache: [pages, heads, page size, head_dim] in the dtype of `key`.
        value_cache: [pages, heads, page size, value's head_dim].
        slots: int64 [tokens]; a token with a negative one is not written.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or, on the CPU, slot.

    Source: Kwon et al. (arXiv 2309.06180), section 4.
    """
    check_tensor("key", key, dim=3, floating=True)
    check_tensor("key_cache", key_cache, dim=4, floating=True, like=key)
    tokens, heads, size = key.shape
    pages, slots_of_page = key_cache.shape[0], key_cache.shape[2]
    check_tensor("value", value, dim=3, floating=True, like=key)
    check_shape("value", value, (tokens, heads, value.shape[2]))
    check_tensor("value_cache", value_cache, floating=True, like=key)
    check_shape("key_cache", key_cache, (pages, heads, slots_of_page, size))
    check_shape("value_cache", value_cache, (pages, heads, slots_of_page, value.shape[2]))
    for name, tensor, cache in (("key_cache", key, key_cache), ("value_cache", value, value_cache)):
        if tensor.dtype != cache.dtype:
            raise TypeError(f"{name}: got {cache.dtype}, wanted {tensor.dtype}")
    check_tensor("slots", slots, dim=1, floating=False, like=key)
    check_shape("slots", slots, (tokens,))
    if slots.dtype != torch.int64:
        raise TypeError(f"slots: got {slots.dtype}, wanted torch.int64")
    torch.ops.pronghorn.cache_write(key, value, key_cache, value_cache, slots)


@torch.library.custom_op("pronghorn::cache_write", mutates_args=("key_cache", "value_cache"))
def _cache_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    if slots.device.type == "cpu" and (slots >= key_cache.shape[0] * key_cache.shape[2]).any():
        raise ValueError(
            f"slots: got {int(slots.max())}, the cache has {key_cache.shape[0]} pages of {key_cache.shape[2]} slots"
        )
    if use_triton("cache_write", key) and key.dtype != torch.float64 and key.numel():
        from pronghorn.kernels.cache_write import triton

        triton.cache_write(key, value, key_cache, value_cache, slots)
    else:
        reference.cache_write(key, value, key_cache, value_cache, slots)


@_cache_write.register_fake
def _(*_: Tensor) -> None:
    return None
