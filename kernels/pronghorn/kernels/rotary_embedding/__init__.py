"""Rotary position embeddings of queries and keys, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._memory import tokens_outside
from pronghorn.kernels.rotary_embedding import reference

__all__ = ["rotary_embedding"]


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin for queries and keys, where rotate_half exchanges both halves and negates the first.

    For inference: nothing is differentiable. Computed in float32 and rounded once.

    Args:
        query: [batch, heads, tokens, head_dim], head_dim even, in fp16, bf16 or fp32 (fp64 in the reference).
        key: [batch, key/value heads, tokens, head_dim].
        cos: [batch or 1, tokens, head_dim], floating point.
        sin: the same.

    Returns:
        Both, in their dtype; each token's heads lie side by side in memory.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Su et al. (arXiv 2104.09864), equation 34, with the halves that GPT-NeoX pairs.
    """
    check_tensor("query", query, dim=4, floating=True)
    batch, _, tokens, size = query.shape
    if size % 2:
        raise ValueError(f"query: got a head_dim of {size}, wanted an even one")
    check_tensor("key", key, dim=4, like=query)
    check_shape("key", key, (batch, key.shape[1], tokens, size))
    if key.dtype != query.dtype:
        raise TypeError(f"key: got {key.dtype}, wanted the query's {query.dtype}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(name, tensor, dim=3, floating=True, like=query)
        check_shape(name, tensor, (1 if tensor.shape[0] == 1 else batch, tokens, size))
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"sin: got {sin.dtype} {tuple(sin.shape)}, wanted that of cos, {cos.dtype} {tuple(cos.shape)}")
    result: tuple[Tensor, Tensor] = torch.ops.pronghorn.rotary_embedding(query, key, cos, sin)
    return result


@torch.library.custom_op("pronghorn::rotary_embedding", mutates_args=())
def _rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if use_triton("rotary_embedding", query) and query.dtype != torch.float64 and query.numel():
        from pronghorn.kernels.rotary_embedding import triton

        return triton.rotary_embedding(query, key, cos, sin)
    return reference.rotary_embedding(query, key, cos, sin)


@_rotary_embedding.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return tokens_outside(query), tokens_outside(key)
