"""Writes one new token a sequence to caches of two kinds of heads, of which one is a ring."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.cache_append import reference
from pronghorn.kernels.decode_attention import CachedHeads, check_cache, check_heads

__all__ = ["cache_append"]


def cache_append(
    key: Tensor,
    value: Tensor,
    full: CachedHeads,
    streaming: CachedHeads,
    head_index: Tensor,
    *,
    sink_size: int,
    recent_size: int,
    bits: int = 16,
) -> None:
    """Write keys and values to their slots, in place, as codes where the caches hold codes, and count them.

    The n-th token of a sequence lies in slot n of `full`; there is no write where that is beyond its capacity. In
    `streaming` it lies in slot n while n < sink_size, then in sink_size + (n - sink_size) mod recent_size. Nothing is
    differentiable.

    Args:
        key: [batch, key/value heads, 1, head_dim].
        value: the same.
        full: its `lengths` are what was written so far, and are one more afterwards; not in pages.
        streaming: the same; a ring's lengths go on beyond its capacity.
        head_index: int32 [key/value heads]: i >= 0 is head i of `full`, i < 0 head -1 - i of `streaming`. That there
            are such heads is checked on the CPU alone, where it waits for nothing.
        sink_size: slots of `streaming` that are never written again.
        recent_size: slots after them that are.
        bits: of the caches: 16 for the keys' dtype, 8 or 4 for codes of `kv_quantize` with one group a head.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Xiao et al. (arXiv 2410.10819), section 2.3; a ring in place of their copies.
    """
    check_tensor("key", key, dim=4, floating=True)
    batch, heads, tokens, size = key.shape
    if tokens != 1:
        raise ValueError(f"key: got {tokens} tokens, wanted 1")
    check_tensor("value", value, floating=True, like=key)
    check_shape("value", value, (batch, heads, 1, size))
    if value.dtype != key.dtype:
        raise TypeError(f"value: got {value.dtype}, wanted the dtype of key, {key.dtype}")
    for name, cache in (("full", full), ("streaming", streaming)):
        if cache.block_table is not None:
            raise ValueError(f"{name}.block_table: caches in pages are not written here")
        check_cache(name, cache, key, bits)
    check_tensor("head_index", head_index, dim=1, like=key)
    check_shape("head_index", head_index, (full.key.shape[1] + streaming.key.shape[1],))
    check_shape("head_index", head_index, (heads,))
    if head_index.dtype != torch.int32:
        raise TypeError(f"head_index: got {head_index.dtype}, wanted torch.int32")
    slots = streaming.key.shape[2]
    if sink_size < 0 or recent_size < 1 or (streaming.key.shape[1] and slots > sink_size + recent_size):
        raise ValueError(
            f"sink_size, recent_size: got {sink_size} and {recent_size}, wanted 0 and 1 or more, and in all no fewer "
            f"than the {slots} slots of streaming"
        )
    torch.ops.pronghorn.cache_append(
        key, value, full.tensors(), streaming.tensors(), full.lengths, streaming.lengths, head_index,
        sink_size, recent_size, bits,
    )  # fmt: skip


@torch.library.custom_op(
    "pronghorn::cache_append", mutates_args=("full", "streaming", "full_lengths", "streaming_lengths")
)
def _cache_append(
    key: Tensor,
    value: Tensor,
    full: list[Tensor],
    streaming: list[Tensor],
    full_lengths: Tensor,
    streaming_lengths: Tensor,
    head_index: Tensor,
    sink_size: int,
    recent_size: int,
    bits: int,
) -> None:
    check_heads(head_index, full[0].shape[1], streaming[0].shape[1])
    arguments = (key, value, full, streaming, full_lengths, streaming_lengths, head_index, sink_size, recent_size, bits)
    if use_triton("cache_append", key) and key.dtype != torch.float64 and key.numel():
        from pronghorn.kernels.cache_append import triton

        triton.cache_append(*arguments)
    else:
        reference.cache_append(*arguments)


@_cache_append.register_fake
def _(*_: object) -> None:
    return None
