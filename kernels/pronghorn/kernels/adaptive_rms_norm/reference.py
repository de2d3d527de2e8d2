"""Definition of a gated residual with the adaptive RMS norm of its sum, and of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor, update: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The modulated norm and the sum, which is empty without an update; of [rows, tokens, channels]."""
    total = x.contiguous()
    if update is not None:
        # Rounded after the product and after the sum, as these are in the dtype of x.
        total = total + (update if gate is None else update * _of_row(gate, x))
    normal = _normal(total, eps)[0]
    out = normal * (1 + _of_row(scale, normal)) + _of_row(shift, normal)
    return out.to(x.dtype), x.new_empty(0) if update is None else total


def gradients(
    grad: Tensor, total_grad: Tensor | None, total: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x, update, scale, shift and gate, the last three in float32 or better; without a gate its two are empty."""
    normal, ratio = _normal(total, eps)
    of_out = grad.to(normal.dtype)
    weighted = of_out * (1 + _of_row(scale, normal))
    of_total = (weighted - normal * (weighted * normal).mean(dim=-1, keepdim=True)) * ratio
    if total_grad is not None:
        of_total = of_total + total_grad
    of_update, of_gate = total.new_empty(0), normal.new_empty(0)
    if update is not None and gate is not None:
        of_update = (of_total * _of_row(gate.to(total.dtype), normal)).to(total.dtype)
        of_gate = (of_total * update).sum(dim=1)
    return of_total.to(total.dtype), of_update, (of_out * normal).sum(dim=1), of_out.sum(dim=1), of_gate


def _normal(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What is modulated, in float32 or better, and its ratio to the sum."""
    values = total.to(torch.promote_types(total.dtype, torch.float32)).contiguous()
    ratio = (values.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return values * ratio, ratio


def _of_row(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype)[:, None]
