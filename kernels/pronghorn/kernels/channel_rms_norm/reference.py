"""Definition of RMS norm over channels, and of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._memory import dense


def channel_rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, activation: str | None
) -> Tensor:
    """In the shape of x; in float32 or better, and rounded once."""
    x = dense(x)
    y = _sum(_normal(x, eps)[0], weight, bias, residual)
    if activation is not None:
        y = y.relu() if activation == "relu" else y * y.sigmoid()
    return torch.empty_like(x).copy_(y)


def gradients(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x, weight, bias and residual; the last is empty where there is none."""
    x = dense(x)
    normal, scale = _normal(x, eps)
    grad = grad.to(normal.dtype)
    if activation is not None:
        y = _sum(normal, weight, bias, residual)
        grad = grad * ((y > 0) if activation == "relu" else y.sigmoid() * (1 + y * (1 - y.sigmoid())))
    weighted = grad * _of_channels(weight, normal)
    of_x = (weighted - normal * (weighted * normal).mean(dim=1, keepdim=True)) * scale
    of_residual = x.new_empty(0) if residual is None else torch.empty_like(x).copy_(grad)
    return torch.empty_like(x).copy_(of_x), (grad * normal).sum(dim=(0, 2, 3)), grad.sum(dim=(0, 2, 3)), of_residual


def _normal(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What the weight is multiplied by, and its ratio to x."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (values.square().mean(dim=1, keepdim=True) + eps).rsqrt()
    return values * scale, scale


def _sum(normal: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = normal * _of_channels(weight, normal)
    y = y if bias is None else y + _of_channels(bias, normal)
    return y if residual is None else y + residual.to(normal.dtype)


def _of_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype)[:, None, None]
