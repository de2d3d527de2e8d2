"""Causal attention in which every head has its own kind of sparsity, for prefill and training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._memory import tokens_outside
from pronghorn.kernels.head_sparse_attention import reference
from pronghorn.kernels.head_sparse_attention.reference import DENSE, STREAMING, Rule

__all__ = ["DENSE", "STREAMING", "head_sparse_attention"]


def head_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_types: Tensor,
    *,
    sink_size: int,
    recent_size: int,
    block_size: int | None = None,
    start: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * query key^T, where the head sees) value, with query heads in groups over the key/value heads.

    Query i stands at position p = i + length - tokens, and no head sees keys after it. A dense head sees all others. A
    streaming head sees a sink at the beginning and a window of recent keys:

    - Token by token: j < sink_size or j > p - recent_size.
    - In blocks: both sizes are rounded up to blocks, and so is length - tokens. With r = ceil((length - tokens) /
      block) + 1 + i // block, the head sees the blocks of the sink and the blocks in [r - recent blocks, r).

    Only tiles of keys that a head sees are read and multiplied, forward and backward.

    Args:
        query: [batch, heads, tokens, head_dim] in fp16, bf16 or fp32 (fp64 in the reference).
        key: [batch, key/value heads, length, head_dim]; heads is a multiple of key/value heads, length >= tokens.
        value: [batch, key/value heads, length, head_dim].
        head_types: int32 [heads]: 0 for a dense head (`DENSE`), -1 for a streaming one (`STREAMING`). Others are
            refused on the CPU; on a GPU, where looking would wait for it, they count as dense.
        sink_size: keys in the sink, >= 0.
        recent_size: keys in the window, with the query's own one, >= 1.
        block_size: keys and queries in a block; None, or 1, for the rule by tokens.
        start: int32 [batch], the first key that is no padding on the left; keys before it are not seen, and the sink
            begins there. Only by tokens. Negative ones are refused on the CPU and count as 0 on a GPU.
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them.
        scale: > 0; 1 / sqrt(head_dim) by default.

    Returns:
        [batch, heads, tokens, head_dim] in the dtype of `query`, each token's heads side by side in memory; zeros for
        a token that sees nothing. Differentiable, once, in `query`, `key` and `value`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Dao (arXiv 2307.08691) for the tiles; Xiao et al. (arXiv 2309.17453) for sink and window; heads of several
    kinds in one call are Block-Sparse-Attention's (Guo et al., 2024).
    """
    _check_tensors(query, key, value, head_types, start)
    block_size = _check_rule(sink_size, recent_size, block_size, start)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: got {softcap!r}, wanted 0 for none or a positive number")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale!r}, wanted a positive number")
    result: tuple[Tensor, Tensor] = torch.ops.pronghorn.head_sparse_attention(
        query, key, value, head_types, start, sink_size, recent_size, block_size, softcap, scale
    )
    return result[0]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, head_types: Tensor, start: Tensor | None) -> None:
    check_tensor("query", query, dim=4, floating=True)
    batch, heads, tokens, size = query.shape
    check_tensor("key", key, dim=4, like=query)
    groups, length = key.shape[1:3]
    check_shape("key", key, (batch, groups, length, size))
    check_tensor("value", value, like=query)
    check_shape("value", value, (batch, groups, length, size))
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"key, value: got {key.dtype} and {value.dtype}, wanted the query's {query.dtype}")
    if not groups or heads % groups:
        raise ValueError(f"key: got {groups} heads, wanted a divisor of the query's {heads}")
    if not size:
        raise ValueError("query: got a head_dim of 0, wanted at least 1")
    if length < tokens:
        raise ValueError(f"key: got a length of {length}, wanted at least the query's {tokens} tokens")
    vectors = {"head_types": (head_types, heads)} if start is None else {
        "head_types": (head_types, heads), "start": (start, batch)
    }  # fmt: skip
    for name, (tensor, count) in vectors.items():
        check_tensor(name, tensor, like=query)
        check_shape(name, tensor, (count,))
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted torch.int32")


def _check_rule(sink_size: int, recent_size: int, block_size: int | None, start: Tensor | None) -> int:
    """The block size, 1 for the rule by tokens."""
    block_size = 1 if block_size is None else block_size
    for name, number, least in (
        ("sink_size", sink_size, 0),
        ("recent_size", recent_size, 1),
        ("block_size", block_size, 1),
    ):
        if not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool):
            raise TypeError(f"{name}: got {number!r}, wanted an integer")
        if number < least:
            raise ValueError(f"{name}: got {number}, wanted at least {least}")
    if block_size > 1 and start is not None:
        raise ValueError(f"start: got a tensor with block_size={block_size}; left padding takes block_size=None")
    return block_size


def _check_values(head_types: Tensor, start: Tensor | None) -> None:
    """Where reading them waits for nothing."""
    if head_types.device.type != "cpu":
        return
    known = (head_types == DENSE) | (head_types == STREAMING)
    if not known.all():
        raise ValueError(f"head_types: got {head_types[~known].tolist()}, accepted are {STREAMING} and {DENSE}")
    if start is not None and (start < 0).any():
        raise ValueError(f"start: got {start.tolist()}, wanted no negative numbers")


@torch.library.custom_op("pronghorn::head_sparse_attention", mutates_args=())
def _head_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_types: Tensor,
    start: Tensor | None,
    sink_size: int,
    recent_size: int,
    block_size: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_values(head_types, start)
    rule = Rule(sink_size, recent_size, block_size, softcap, scale)
    if use_triton("head_sparse_attention", query) and query.dtype != torch.float64 and query.numel():
        from pronghorn.kernels.head_sparse_attention import triton

        return triton.head_sparse_attention(query, key, value, head_types, start, rule)
    return reference.head_sparse_attention(query, key, value, head_types, start, rule)


@_head_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return tokens_outside(query), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("pronghorn::head_sparse_attention_backward", mutates_args=())
def _head_sparse_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_types: Tensor,
    start: Tensor | None,
    sink_size: int,
    recent_size: int,
    block_size: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = Rule(sink_size, recent_size, block_size, softcap, scale)
    if use_triton("head_sparse_attention", query) and query.dtype != torch.float64 and query.numel():
        from pronghorn.kernels.head_sparse_attention import triton_backward

        return triton_backward.backward(grad, out, log_sum_exp, query, key, value, head_types, start, rule)
    return reference.backward(grad, log_sum_exp, query, key, value, head_types, start, rule)


@_head_sparse_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, log_sum_exp: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tokens_outside(query), tokens_outside(key), tokens_outside(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.sink_size, ctx.recent_size, ctx.block_size, ctx.softcap, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    rule = (ctx.sink_size, ctx.recent_size, ctx.block_size, ctx.softcap, ctx.scale)
    grads = torch.ops.pronghorn.head_sparse_attention_backward(grad, *ctx.saved_tensors, *rule)
    return (*grads, *[None] * 7)


_head_sparse_attention.register_autograd(_backward, setup_context=_setup_context)
