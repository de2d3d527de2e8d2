"""Attention of new tokens over a key/value cache, part of which they may see."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.cached_attention import reference

__all__ = ["cached_attention"]


def cached_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T, where mask) value, with a group of query heads for each head of the cache.

    For inference: nothing is differentiable. A stretch of the cache that no token sees is not read.

    Args:
        query: [batch, heads, tokens, head size] in fp16, bf16 or fp32 (fp64 in the reference).
        key: [batch, cached heads, capacity, head size]; cached heads divide heads, and head i reads i * cached / heads.
        value: [batch, cached heads, capacity, head size].
        mask: bool [batch or 1, 1, tokens, capacity], True for what a token sees.
        scale: 1 / sqrt(head size) by default.

    Returns:
        [batch, tokens, heads, head size] in the dtype of `query`; zeros for a token that sees nothing.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Dao et al., Flash-Decoding (2023): the cache is split between blocks, and partial softmaxes are joined.
    """
    check_tensor("query", query, dim=4, floating=True)
    batch, heads, tokens, size = query.shape
    if not size:
        raise ValueError("query: got a head size of 0, wanted at least 1")
    check_tensor("key", key, dim=4, like=query)
    cached, capacity = key.shape[1:3]
    check_shape("key", key, (batch, cached, capacity, size))
    check_tensor("value", value, like=key)
    check_shape("value", value, (batch, cached, capacity, size))
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"key, value: got {key.dtype} and {value.dtype}, wanted the query's {query.dtype}")
    if not cached or heads % cached:
        raise ValueError(f"key: got {cached} heads, wanted a divisor of the query's {heads}")
    check_tensor("mask", mask, dim=4, like=key)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, wanted torch.bool")
    check_shape("mask", mask, (batch if mask.shape[0] != 1 else 1, 1, tokens, capacity))
    result: Tensor = torch.ops.pronghorn.cached_attention(
        query, key, value, mask, size**-0.5 if scale is None else scale
    )
    return result


@torch.library.custom_op("pronghorn::cached_attention", mutates_args=())
def _cached_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    if use_triton("cached_attention", query) and query.dtype != torch.float64 and query.numel() and key.numel():
        from pronghorn.kernels.cached_attention import triton

        return triton.cached_attention(query, key, value, mask, scale)
    return reference.cached_attention(query, key, value, mask, scale)


@_cached_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape)
