"""Definition of batch norm over the first rows, and of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor, count: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean, biased variance."""
    count = count.clamp(max=len(x))
    there = _there(x, count)
    values = torch.where(there, x, 0).to(torch.promote_types(x.dtype, torch.float32))
    mean = values.sum(dim=0) / count
    centred = torch.where(there, values - mean, 0)
    variance = centred.square().sum(dim=0) / count
    y = centred * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return torch.where(there, y, 0).to(x.dtype), mean, variance


def gradients(
    x: Tensor, grad: Tensor, count: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias."""
    count = count.clamp(max=len(x))
    there = _there(x, count)
    scale = (variance + eps).rsqrt()
    normal = torch.where(there, (x - mean) * scale, 0)
    grad = torch.where(there, grad, 0).to(normal.dtype)
    of_bias, of_weight = grad.sum(dim=0), (grad * normal).sum(dim=0)
    of_x = (grad - of_bias / count - normal * (of_weight / count)) * (scale if weight is None else scale * weight)
    return torch.where(there, of_x, 0).to(x.dtype), of_weight, of_bias


def _there(x: Tensor, count: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)[:, None] < count
