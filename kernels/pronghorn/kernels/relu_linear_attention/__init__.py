"""Linear attention with ReLU: keys and values are summed into a small state, which every query reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor, wants_gradient
from pronghorn.kernels._dispatch import triton_kernels, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.relu_linear_attention import reference

__all__ = ["attend_state", "key_value_state", "relu_linear_attention"]

LARGEST_HEAD = 128
LEAST_EPS = 1e-37  # below it, float32 has no number that divides


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-15) -> Tensor:
    """Each token's mean of all values, weighted by relu(q) · relu(k): sum of weights v / (sum of weights + eps).

    Differentiable in `q`, `k` and `v`. Sums are in float32 (float64 of such a `q`), and in the same order at every
    call. Strides may be any: tensors whose tokens or channels are adjacent are read where they are.

    Args:
        q: [batch, heads, tokens, head_dim] in fp16, bf16 or fp32 (fp64 in the reference); head_dim is at most 128.
        k: the same.
        v: the same.
        eps: added to the sum of the weights.

    Returns:
        [batch, heads, tokens, head_dim] in the dtype of `q`, its axes in the same order in memory; zeros for a token
        whose relu(q) is zero.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Katharopoulos et al. (arXiv 2006.16236), section 3.2, with the ReLU of Cai et al. (arXiv 2205.14756).
    """
    _check_head("q", q)
    _check_alike("k", k, "q", q)
    _check_alike("v", v, "q", q)
    _check_eps(eps)
    if wants_gradient(q, k, v):
        result: Tensor = _Differentiable.apply(q, k, v, eps)
    else:
        result = _operation(q, k, v, eps)
    return result


def key_value_state(k: Tensor, v: Tensor) -> Tensor:
    """The sum over tokens of [v; 1] relu(k)^T: all that queries need to know of these tokens.

    States of parts of the tokens add up to the state of all.

    Args:
        k: [batch, heads, tokens, head_dim] in fp16, bf16 or fp32 (fp64 in the reference); head_dim is at most 128.
        v: the same.

    Returns:
        float32 (float64 of such a `k`) [batch, heads, head_dim + 1, head_dim]: a row for each channel of `v`, and last
        the sum of the keys.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device. RuntimeError: a gradient is asked for.

    Source: Katharopoulos et al. (arXiv 2006.16236), section 3.2.
    """
    _check_head("k", k)
    _check_alike("v", v, "k", k)
    _refuse_gradient("key_value_state", k, v)
    result: Tensor = _state_operation(k, v)
    return result


def attend_state(q: Tensor, state: Tensor, *, eps: float = 1e-15) -> Tensor:
    """What queries read from a state: (values' rows relu(q)) / (last row relu(q) + eps).

    Args:
        q: [batch, heads, tokens, head_dim] in fp16, bf16 or fp32 (fp64 in the reference); head_dim is at most 128.
        state: float32 (float64 for such a `q`) [batch, heads, head_dim + 1, head_dim], of `key_value_state`.
        eps: added to the sum of the weights.

    Returns:
        [batch, heads, tokens, head_dim] in the dtype of `q`, its axes in the same order in memory.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value. RuntimeError: a gradient is
            asked for.

    Source: Katharopoulos et al. (arXiv 2006.16236), section 3.2.
    """
    _check_head("q", q)
    batch, heads, _, size = q.shape
    check_tensor("state", state, like=q)
    check_shape("state", state, (batch, heads, size + 1, size))
    wide = torch.promote_types(q.dtype, torch.float32)
    if state.dtype != wide:
        raise TypeError(f"state: got {state.dtype}, wanted {wide}")
    _check_eps(eps)
    _refuse_gradient("attend_state", q, state)
    result: Tensor = _read_operation(q, state, eps)
    return result


def _check_head(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor, dim=4, floating=True)
    if not 1 <= tensor.shape[3] <= LARGEST_HEAD:
        raise ValueError(f"{name}: got a head_dim of {tensor.shape[3]}, wanted 1 to {LARGEST_HEAD}")


def _check_alike(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    check_tensor(name, tensor, like=like)
    check_shape(name, tensor, like.shape)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted the dtype of {other}, {like.dtype}")


def _check_eps(eps: float) -> None:
    if not LEAST_EPS <= eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, wanted a number from {LEAST_EPS} on")


def _refuse_gradient(name: str, *tensors: Tensor) -> None:
    if wants_gradient(*tensors):
        raise RuntimeError(f"{name}: is for inference, under torch.no_grad(); relu_linear_attention has gradients")


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(q, k, v)
        result: Tensor = _operation(q, k, v, eps)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_gradient_operation(*ctx.saved_tensors, grad, ctx.eps), None


def _triton(tensor: Tensor) -> bool:
    return use_triton("relu_linear_attention", tensor) and tensor.dtype != torch.float64 and tensor.numel() > 0


def _forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    if _triton(q):
        result: Tensor = triton_kernels("relu_linear_attention").relu_linear_attention(q, k, v, eps)
        return result
    return reference.attend_state(q, reference.key_value_state(k, v), eps)


def _state(k: Tensor, v: Tensor) -> Tensor:
    if _triton(k):
        result: Tensor = triton_kernels("relu_linear_attention").key_value_state(k, v)
        return result
    return reference.key_value_state(k, v)


def _read(q: Tensor, state: Tensor, eps: float) -> Tensor:
    if _triton(q):
        result: Tensor = triton_kernels("relu_linear_attention").attend_state(q, state, eps)
        return result
    return reference.attend_state(q, state, eps)


def _fake_state(k: Tensor, v: Tensor) -> Tensor:
    batch, heads, _, size = k.shape
    return k.new_empty(batch, heads, size + 1, size, dtype=torch.promote_types(k.dtype, torch.float32))


_operation = define("relu_linear_attention", _forward, lambda q, *_: torch.empty_like(q))
_state_operation = define("relu_linear_attention_state", _state, _fake_state)
_read_operation = define("relu_linear_attention_read", _read, lambda q, *_: torch.empty_like(q))
_gradient_operation = define(
    "relu_linear_attention_gradients", reference.gradients,
    lambda q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)  # fmt: skip
