"""The definition of what follows a convolution."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_activation(x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """[batch, channels, height, width] in the dtype of x."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    if residual is not None:
        y = y + residual.to(y.dtype)
    if activation == "relu":
        y = y.relu()
    elif activation == "silu":
        y = y * y.sigmoid()
    # A tensor of its own, in the format of x, also where there is nothing to do.
    return torch.empty_like(x).copy_(y)
