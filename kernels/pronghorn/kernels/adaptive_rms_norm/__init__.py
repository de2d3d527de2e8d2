"""A gated residual and the adaptive RMS norm of its sum, in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.adaptive_rms_norm import reference

__all__ = ["adaptive_rms_norm"]


def adaptive_rms_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """total = x + update * gate, and total / sqrt(mean over channels of total^2 + eps) * (1 + scale) + shift.

    Between two norms of a transformer, `x` is the residual, `update` what a layer adds to it, `gate` from the norm
    before that layer, and `scale` and `shift` are of the norm after it.

    The product, the sum and the norm are each rounded to the dtype of `x`, where that has 16 bits; statistics,
    modulation and sums of gradients are in float32 (float64 of such an `x`), in the same order at every call.
    Differentiable, once, in all tensors.

    Args:
        x: [..., tokens, channels] in fp16, bf16 or fp32 (fp64 in the reference).
        scale: [..., channels], of any floating-point dtype, the same for all tokens of a row. It and the next may be
            parts of one tensor of modulations; only channels that do not lie side by side are copied first.
        shift: [..., channels], likewise.
        update: in the shape and the dtype of `x`; None for zeros.
        gate: [..., channels], likewise, rounded to the dtype of `x`; None for ones. Only with an update.
        eps: added to the mean of squares.

    Returns:
        The norm and the total, both in the shape and the dtype of `x`; without an update the total is `x` itself.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Zhang and Sennrich (arXiv 1910.07467), equation 4; Peebles and Xie (arXiv 2212.09748) for the modulation.
    """
    check_tensor("x", x, floating=True)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least 2 dimensions")
    tokens, channels = x.shape[-2:]
    if not channels:
        raise ValueError("x: got no channels, wanted at least 1")
    vectors = {"scale": scale, "shift": shift} if gate is None else {"scale": scale, "shift": shift, "gate": gate}
    for name, vector in vectors.items():
        check_tensor(name, vector, floating=True, like=x)
        check_shape(name, vector, (*x.shape[:-2], channels))
    if update is not None:
        check_tensor("update", update, like=x)
        check_shape("update", update, tuple(x.shape))
        if update.dtype != x.dtype:
            raise TypeError(f"update: got {update.dtype}, wanted that of x, {x.dtype}")
    elif gate is not None:
        raise ValueError("gate: got a tensor without an update, wanted None")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, wanted a positive number")
    rows = math.prod(x.shape[:-2])
    scale, shift = scale.reshape(rows, channels), shift.reshape(rows, channels)
    gate = None if gate is None else gate.reshape(rows, channels)
    folded = None if update is None else update.reshape(rows, tokens, channels)
    out, total = _call(x.reshape(rows, tokens, channels), scale, shift, folded, gate, eps)
    return out.reshape(x.shape), x if update is None else total.reshape(x.shape)


def _call(
    x: Tensor, scale: Tensor, shift: Tensor, update: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    given = [tensor for tensor in (x, scale, shift, update, gate) if tensor is not None]
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    operation = _Differentiable.apply if trained else _forward_operation
    result: tuple[Tensor, Tensor] = operation(x, scale, shift, update, gate, eps)
    return result


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, update: Tensor | None, gate: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total = _forward_operation(x, scale, shift, update, gate, eps)
        ctx.eps = eps
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (scale, shift, gate)]
        ctx.added = update is not None
        ctx.set_materialize_grads(False)  # a total that nobody uses has no gradient to read
        ctx.save_for_backward(total if ctx.added else x, scale, *((update, gate) if gate is not None else (None, None)))
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, total_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scale, update, gate = ctx.saved_tensors
        grad = torch.zeros_like(total) if grad is None else grad
        of_x, of_update, *sums = _backward_operation(
            grad, total_grad if ctx.added else None, total, scale, update, gate, ctx.eps
        )
        if gate is None:
            of_update = of_x if ctx.added else None
        of_scale, of_shift, of_gate = (
            None if dtype is None else found.to(dtype) for found, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        return of_x, of_scale, of_shift, of_update, of_gate, None


def _triton(x: Tensor) -> bool:
    return use_triton("adaptive_rms_norm", x) and x.dtype != torch.float64 and x.numel() > 0


def _forward(
    x: Tensor, scale: Tensor, shift: Tensor, update: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if _triton(x):
        from pronghorn.kernels.adaptive_rms_norm import triton

        return triton.adaptive_rms_norm(x, scale, shift, update, gate, eps)
    return reference.adaptive_rms_norm(x, scale, shift, update, gate, eps)


def _backward(
    grad: Tensor, total_grad: Tensor | None, total: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _triton(total):
        from pronghorn.kernels.adaptive_rms_norm import triton

        return triton.gradients(grad, total_grad, total, scale, update, gate, eps)
    return reference.gradients(grad, total_grad, total, scale, update, gate, eps)


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake(x: Tensor, scale: Tensor, shift: Tensor, update: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _dense(x), x.new_empty(0) if update is None else _dense(x)


def _fake_backward(
    grad: Tensor, total_grad: Tensor | None, total: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(total.dtype, torch.float32)
    gated = update is not None and gate is not None
    of_scale, of_shift = (scale.new_empty(scale.shape, dtype=wide) for _ in range(2))
    of_gate = scale.new_empty(scale.shape if gated else 0, dtype=wide)
    return _dense(total), _dense(total) if gated else total.new_empty(0), of_scale, of_shift, of_gate


_forward_operation = define("adaptive_rms_norm", _forward, _fake)
_backward_operation = define("adaptive_rms_norm_gradients", _backward, _fake_backward)
