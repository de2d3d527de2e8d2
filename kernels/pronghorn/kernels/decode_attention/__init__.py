"""Attention of one new token a sequence, over caches of two kinds of heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_cuda, use_triton
from pronghorn.kernels.decode_attention import cuda, reference
from pronghorn.kernels.decode_attention.call import Call

__all__ = ["CachedHeads", "decode_attention"]

BITS = (16, 8, 4)


class CachedHeads(NamedTuple):
    """The cache of the heads of one kind, of which there may be none.

    Attributes:
        key: [batch, heads, capacity, head_dim], or in pages [pages, heads, page size, head_dim]; uint8 codes of
            `kv_quantize` for 8 and 4 bits, where the last dimension is head_dim * bits / 8.
        value: the same.
        lengths: int32 [batch]: slots that are filled, in any order; more than the capacity are all, as in a ring.
        start: int32 [batch]: slots before it are not seen; 0 by default.
        block_table: int32 [batch, pages of a sequence], where the cache is in pages.
        key_scale: fp16 [batch, heads, capacity, 1], or in pages, for 8 and 4 bits; and so on.
        key_zero: the same.
        value_scale: the same.
        value_zero: the same.
        sink_size: first slots that are seen besides the recent ones, where those are limited.
        recent_size: last filled slots that are seen; None for all, with no regard to `sink_size`.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    start: Tensor | None = None
    block_table: Tensor | None = None
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None
    sink_size: int = 0
    recent_size: int | None = None

    def tensors(self) -> list[Tensor]:
        """Keys and values, or codes, scales and zeros of keys and of values."""
        found = (self.key, self.key_scale, self.key_zero, self.value, self.value_scale, self.value_zero)
        return [tensor for tensor in found if tensor is not None]

    def window(self) -> tuple[int, int]:
        """Sink and recent slots, -1 of the latter for all."""
        return self.sink_size, -1 if self.recent_size is None else self.recent_size


def decode_attention(
    query: Tensor,
    full: CachedHeads,
    streaming: CachedHeads,
    head_index: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bits: int = 16,
) -> Tensor:
    """softmax(scale * query key^T) value for each head over the cache of its kind.

    For inference: nothing is differentiable. The caches are two because those of one kind grow and those of the other
    do not; heads of either stay where they are in `query`.

    Args:
        query: [batch, heads, 1, head_dim] in fp16, bf16 or fp32 (fp64 in the reference).
        full: the cache of one kind.
        streaming: the cache of the other.
        head_index: int32 [key/value heads]: i >= 0 is head i of `full`, i < 0 head -1 - i of `streaming`. Heads are a
            multiple of key/value heads. That there are such heads is checked on the CPU alone.
        key: [batch, key/value heads, 1, head_dim], a token that is in no cache yet, and that all heads see.
        value: the same.
        scale: 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(scores / softcap) if it is not 0.
        bits: of the caches: 16 for the query's dtype, 8 or 4 for codes of `kv_quantize` with one group a head.

    Returns:
        [batch, heads, 1, head_dim]; zeros where nothing is seen.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Dao et al., Flash-Decoding (2023); Xiao et al. (arXiv 2410.10819), section 2.3.
    """
    check_tensor("query", query, dim=4, floating=True)
    batch, heads, tokens, size = query.shape
    check_tensor("head_index", head_index, dim=1, floating=False, like=query)
    if tokens != 1:
        raise ValueError(f"query: got {tokens} tokens, wanted 1")
    if not size:
        raise ValueError("query: got a head_dim of 0, wanted at least 1")
    if head_index.dtype != torch.int32:
        raise TypeError(f"head_index: got {head_index.dtype}, wanted torch.int32")
    if bits not in BITS:
        raise ValueError(f"bits: got {bits!r}, accepted are {', '.join(map(str, BITS))}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: got {softcap!r}, wanted 0 for none or a positive number")
    for name, cache in (("full", full), ("streaming", streaming)):
        check_cache(name, cache, query, bits)
    kinds = head_index.shape[0]
    if not kinds or heads % kinds or full.key.shape[1] + streaming.key.shape[1] != kinds:
        raise ValueError(
            f"head_index: got {kinds} heads, wanted those of full ({full.key.shape[1]}) and streaming "
            f"({streaming.key.shape[1]}), and a divisor of the query's {heads}"
        )
    if (key is None) != (value is None):
        raise ValueError("key, value: got one without the other")
    for name, tensor in (("key", key), ("value", value)):
        if tensor is not None:
            check_tensor(name, tensor, like=query)
            check_shape(name, tensor, (batch, kinds, 1, size))
            if tensor.dtype != query.dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, wanted the query's {query.dtype}")
    result: Tensor = torch.ops.pronghorn.decode_attention(
        query, full.tensors(), streaming.tensors(), [full.lengths, streaming.lengths],
        [full.start, streaming.start], [full.block_table, streaming.block_table],
        [*full.window(), *streaming.window()], head_index,
        key, value, size**-0.5 if scale is None else scale, softcap, bits,
    )  # fmt: skip
    return result


def check_cache(name: str, cache: CachedHeads, query: Tensor, bits: int) -> None:
    """Raise unless a cache fits to queries [batch, heads, 1, head_dim]."""
    batch, size = query.shape[0], query.shape[3]
    check_tensor(f"{name}.key", cache.key, dim=4, like=query)
    pages, heads, slots = cache.key.shape[:3]
    if cache.block_table is None:
        pages = batch
    else:
        check_tensor(f"{name}.block_table", cache.block_table, dim=2, floating=False, like=query)
        check_shape(f"{name}.block_table", cache.block_table, (batch, cache.block_table.shape[1]))
        if cache.block_table.dtype != torch.int32:
            raise TypeError(f"{name}.block_table: got {cache.block_table.dtype}, wanted torch.int32")
    width = size if bits == 16 else size * bits // 8
    dtype = query.dtype if bits == 16 else torch.uint8
    for part, tensor in (("key", cache.key), ("value", cache.value)):
        check_tensor(f"{name}.{part}", tensor, like=query)
        check_shape(f"{name}.{part}", tensor, (pages, heads, slots, width))
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{part}: got {tensor.dtype}, wanted {dtype} for {bits} bits")
    for part in ("key_scale", "key_zero", "value_scale", "value_zero"):
        found: Tensor | None = getattr(cache, part)
        if (found is None) != (bits == 16):
            raise ValueError(f"{name}.{part}: {'is missing' if found is None else 'has no meaning'} with {bits} bits")
        if found is not None:
            check_tensor(f"{name}.{part}", found, floating=True, like=query)
            check_shape(f"{name}.{part}", found, (pages, heads, slots, 1))
    if cache.sink_size < 0:
        raise ValueError(f"{name}.sink_size: got {cache.sink_size}, wanted 0 or more")
    if cache.recent_size is not None and cache.recent_size < 1:
        raise ValueError(f"{name}.recent_size: got {cache.recent_size}, wanted None or at least 1")
    vectors = {"lengths": cache.lengths} if cache.start is None else {"lengths": cache.lengths, "start": cache.start}
    for part, vector in vectors.items():
        check_tensor(f"{name}.{part}", vector, floating=False, like=query)
        check_shape(f"{name}.{part}", vector, (batch,))
        if vector.dtype != torch.int32:
            raise TypeError(f"{name}.{part}: got {vector.dtype}, wanted torch.int32")


def check_heads(head_index: Tensor, full: int, streaming: int) -> None:
    """Raise where an index names a head that a cache has not; on a GPU, where looking would wait for it, nothing."""
    if head_index.device.type != "cpu":
        return
    wanted = [*range(-streaming, full)]
    if sorted(head_index.tolist()) != wanted:
        raise ValueError(f"head_index: got {head_index.tolist()}, wanted each of {wanted} once")


@torch.library.custom_op("pronghorn::decode_attention", mutates_args=())
def _decode_attention(
    query: Tensor,
    full: list[Tensor],
    streaming: list[Tensor],
    lengths: list[Tensor],
    start: list[Tensor | None],
    block_table: list[Tensor | None],
    windows: list[int],
    head_index: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    scale: float,
    softcap: float,
    bits: int,
) -> Tensor:
    check_heads(head_index, full[0].shape[1], streaming[0].shape[1])
    call = Call(
        query, full, streaming, lengths, start, block_table, windows, head_index, key, value, scale, softcap, bits
    )
    if use_triton("decode_attention", query) and query.dtype != torch.float64 and query.numel():
        if use_cuda("decode_attention", cuda.obstacle(call)):
            return cuda.decode_attention(call)
        from pronghorn.kernels.decode_attention import triton

        return triton.decode_attention(call)
    return reference.decode_attention(call)


@_decode_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)
