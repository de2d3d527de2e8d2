"""Attention of several branches of tokens over one observation they share, for training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.shared_observation_attention import reference
from pronghorn.kernels.shared_observation_attention.reference import Tensors

__all__ = ["shared_observation_attention"]


def shared_observation_attention(
    prefix_query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    branch_query: Tensor,
    branch_key: Tensor,
    branch_value: Tensor,
    prefix_mask: Tensor,
    branch_mask: Tensor,
    *,
    state_tokens: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T, where a query sees) value, for a prefix and for branches that share it.

    A query of the prefix sees all real keys of the prefix. A query of a branch sees these and its own branch, both
    ways, never another branch; the first `state_tokens` of a branch see of it only each other. So the result of a
    branch is that of a sequence of the prefix and this branch alone.

    Masked-out tokens of the prefix and masked-out branches are not read: their results and their gradients are zeros.
    Differentiable, once, in the six tensors. Sums are in float32 and in the same order at every call.

    Args:
        prefix_query: [batch, prefix tokens, heads, head_dim] in fp16, bf16 or fp32 (fp64 in the reference). This and
            the next five: what is not contiguous is copied first.
        prefix_key: [batch, prefix tokens, key/value heads, head_dim]; heads is a multiple of key/value heads.
        prefix_value: [batch, prefix tokens, key/value heads, head_dim].
        branch_query: [batch, branches, branch tokens, heads, head_dim].
        branch_key: [batch, branches, branch tokens, key/value heads, head_dim].
        branch_value: [batch, branches, branch tokens, key/value heads, head_dim].
        prefix_mask: bool [batch, prefix tokens], True for real tokens, anywhere.
        branch_mask: bool [batch, branches], True for branches that count.
        state_tokens: tokens at the beginning of a branch that do not see the rest of it, 0 to branch tokens.
        scale: > 0; 1 / sqrt(head_dim) by default.

    Returns:
        The prefix's result in the shape of `prefix_query`, and the branches' in the shape of `branch_query`, both
        contiguous and in their dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Dao (arXiv 2307.08691) for the tiles; the pattern is that of a policy trained at several delays at once
        (arXiv 2512.01031).
    """
    tensors = Tensors(prefix_query, prefix_key, prefix_value, branch_query, branch_key, branch_value)
    _check_tensors(tensors)
    _check_masks(tensors, prefix_mask, branch_mask)
    tokens = branch_query.shape[2]
    if not isinstance(state_tokens, (int, torch.SymInt)) or isinstance(state_tokens, bool):
        raise TypeError(f"state_tokens: got {state_tokens!r}, wanted an integer")
    if not 0 <= state_tokens <= tokens:
        raise ValueError(f"state_tokens: got {state_tokens}, wanted 0 to the branches' {tokens} tokens")
    scale = prefix_query.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale!r}, wanted a positive number")
    how = prefix_mask, branch_mask, state_tokens, scale
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        trained: tuple[Tensor, Tensor] = _Differentiable.apply(*tensors, *how)
        return trained
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _forward_operation(*tensors, *how)
    return result[:2]


def _check_tensors(tensors: Tensors) -> None:
    query, branch = tensors.prefix_query, tensors.branch_query
    check_tensor("prefix_query", query, dim=4, floating=True)
    batch, length, heads, size = query.shape
    check_tensor("prefix_key", tensors.prefix_key, dim=4, like=query)
    groups = tensors.prefix_key.shape[2]
    if not groups or not heads or heads % groups:
        raise ValueError(f"prefix_key: got {groups} heads, wanted a divisor of prefix_query's {heads}")
    if not size:
        raise ValueError("prefix_query: got a head_dim of 0, wanted at least 1")
    check_tensor("branch_query", branch, dim=5, like=query)
    branches, tokens = branch.shape[1:3]
    of_keys = (batch, length, groups, size), (batch, branches, tokens, groups, size)
    shapes = (query.shape, *of_keys[:1] * 2, (batch, branches, tokens, heads, size), *of_keys[1:] * 2)
    for name, tensor, shape in zip(Tensors._fields, tensors, shapes, strict=True):
        check_tensor(name, tensor, like=query)
        check_shape(name, tensor, tuple(shape))
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted prefix_query's {query.dtype}")


def _check_masks(tensors: Tensors, prefix_mask: Tensor, branch_mask: Tensor) -> None:
    shapes = tensors.prefix_query.shape[:2], tensors.branch_query.shape[:2]
    masks = (("prefix_mask", prefix_mask), ("branch_mask", branch_mask))
    for (name, mask), shape in zip(masks, shapes, strict=True):
        check_tensor(name, mask, like=tensors.prefix_query)
        check_shape(name, mask, tuple(shape))
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: got {mask.dtype}, wanted torch.bool")


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, prefix_mask, branch_mask, ctx.state_tokens, ctx.scale = arguments
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _forward_operation(*arguments)
        ctx.save_for_backward(*result, *tensors, prefix_mask, branch_mask)
        return result[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, prefix_grad: Tensor, branch_grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _backward_operation(prefix_grad, branch_grad, *ctx.saved_tensors, ctx.state_tokens, ctx.scale)
        return (*grads, None, None, None, None)


def _triton(tensors: Tensors) -> bool:
    query, branch = tensors.prefix_query, tensors.branch_query
    fits = query.dtype != torch.float64 and query.numel() > 0 and branch.numel() > 0
    return use_triton("shared_observation_attention", query) and fits


def _forward(
    prefix_query: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    branch_query: Tensor, branch_key: Tensor, branch_value: Tensor,
    prefix_mask: Tensor, branch_mask: Tensor, state_tokens: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = Tensors(prefix_query, prefix_key, prefix_value, branch_query, branch_key, branch_value)
    if _triton(tensors):
        from pronghorn.kernels.shared_observation_attention import triton

        return triton.shared_observation_attention(tensors, prefix_mask, branch_mask, state_tokens, scale)
    return reference.shared_observation_attention(tensors, prefix_mask, branch_mask, state_tokens, scale)


def _backward(
    prefix_grad: Tensor, branch_grad: Tensor, prefix_out: Tensor, branch_out: Tensor,
    prefix_total: Tensor, branch_total: Tensor,
    prefix_query: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    branch_query: Tensor, branch_key: Tensor, branch_value: Tensor,
    prefix_mask: Tensor, branch_mask: Tensor, state_tokens: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = Tensors(prefix_query, prefix_key, prefix_value, branch_query, branch_key, branch_value)
    if _triton(tensors):
        from pronghorn.kernels.shared_observation_attention import triton_backward

        return triton_backward.gradients(
            prefix_grad, branch_grad, prefix_out, branch_out, prefix_total, branch_total, tensors, prefix_mask,
            branch_mask, state_tokens, scale,
        )  # fmt: skip
    return reference.gradients(
        prefix_grad, branch_grad, prefix_total, branch_total, tensors, prefix_mask, branch_mask, state_tokens, scale
    )


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prefix, branch = arguments[0], arguments[3]
    wide = torch.promote_types(prefix.dtype, torch.float32)
    totals = (tensor.new_empty(tensor.shape[:-1], dtype=wide) for tensor in (prefix, branch))
    return _empty(prefix), _empty(branch), *totals


_forward_operation = define("shared_observation_attention", _forward, _fake)
_backward_operation = define(
    "shared_observation_attention_gradients", _backward, lambda *arguments: tuple(map(_empty, arguments[6:12]))
)
