"""Attention of a few new tokens over a cached prefix and over themselves, for inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.suffix_attention import reference

__all__ = ["suffix_attention"]


def suffix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_mask: Tensor,
    *,
    state_tokens: int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * query [prefix_key, key]^T, where a query sees) [prefix_value, value], without joining both.

    A query sees all real keys of the prefix and all of the tokens' own, ahead of it too; the first `state_tokens`
    queries see of their own keys only the first `state_tokens`.

    For inference: nothing is differentiable.

    Args:
        query: [batch, tokens, heads, head_dim] in fp16, bf16 or fp32 (fp64 in the reference). This and the next four:
            what is not contiguous is copied first.
        prefix_key: [batch, prefix tokens, key/value heads, head_dim]; heads is a multiple of key/value heads.
        prefix_value: [batch, prefix tokens, key/value heads, head_dim]; finite also where it is masked out.
        key: [batch, tokens, key/value heads, head_dim].
        value: [batch, tokens, key/value heads, head_dim]; not copied where its tokens lie evenly spaced.
        prefix_mask: bool [batch, prefix tokens], True for real tokens, anywhere.
        state_tokens: tokens at the beginning that do not see the rest, 0 to tokens.
        scale: > 0; 1 / sqrt(head_dim) by default.

    Returns:
        In the shape and the dtype of `query`, contiguous.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Dao et al., Flash-Decoding (2023): keys are split between blocks, and partial softmaxes are joined.
    """
    check_tensor("query", query, dim=4, floating=True)
    batch, tokens, heads, size = query.shape
    check_tensor("prefix_key", prefix_key, dim=4, like=query)
    length, groups = prefix_key.shape[1:3]
    if not groups or not heads or heads % groups:
        raise ValueError(f"prefix_key: got {groups} heads, wanted a divisor of the query's {heads}")
    if not size:
        raise ValueError("query: got a head_dim of 0, wanted at least 1")
    for name, tensor, count in (
        ("prefix_key", prefix_key, length), ("prefix_value", prefix_value, length), ("key", key, tokens),
        ("value", value, tokens),
    ):  # fmt: skip
        check_tensor(name, tensor, like=query)
        check_shape(name, tensor, (batch, count, groups, size))
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted the query's {query.dtype}")
    check_tensor("prefix_mask", prefix_mask, like=query)
    check_shape("prefix_mask", prefix_mask, (batch, length))
    if prefix_mask.dtype != torch.bool:
        raise TypeError(f"prefix_mask: got {prefix_mask.dtype}, wanted torch.bool")
    if not isinstance(state_tokens, (int, torch.SymInt)) or isinstance(state_tokens, bool):
        raise TypeError(f"state_tokens: got {state_tokens!r}, wanted an integer")
    if not 0 <= state_tokens <= tokens:
        raise ValueError(f"state_tokens: got {state_tokens}, wanted 0 to the query's {tokens} tokens")
    scale = size**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale!r}, wanted a positive number")
    result: Tensor = _operation(
        query.detach(), prefix_key.detach(), prefix_value.detach(), key.detach(), value.detach(), prefix_mask,
        state_tokens, scale,
    )  # fmt: skip
    return result


def _forward(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor, prefix_mask: Tensor,
    state_tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    tensors = query, prefix_key, prefix_value, key, value, prefix_mask
    if use_triton("suffix_attention", query) and query.dtype != torch.float64 and query.numel() > 0:
        from pronghorn.kernels.suffix_attention import triton

        return triton.suffix_attention(*tensors, state_tokens, scale)
    return reference.suffix_attention(*tensors, state_tokens, scale)


def _fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_operation = define("suffix_attention", _forward, _fake)
