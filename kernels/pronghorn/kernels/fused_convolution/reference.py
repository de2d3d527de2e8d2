"""The definition of a convolution and what follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


@without_autocast
def fused_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """[batch, results, height, width], channels_last."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def of_channels(vector: Tensor) -> Tensor:
        return vector.to(wide)[:, None, None]

    y = _convolve(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if norm_weight is not None:
        y = y * (y.square().mean(dim=1, keepdim=True) + eps).rsqrt() * of_channels(norm_weight)
        y = y if norm_bias is None else y + of_channels(norm_bias)
    y = y if residual is None else y + residual.to(wide)
    if activation is not None:
        y = y.relu() if activation == "relu" else y * y.sigmoid()
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In all bits of float32: `torch.conv2d` lets cuDNN multiply in TF32 unless a setting forbids it."""
    result: Tensor = torch.ops.aten._convolution(
        x, weight, bias, stride=[1, 1], padding=[1, 1], dilation=[1, 1], transposed=False, output_padding=[0, 0],
        groups=1, benchmark=False, deterministic=True, cudnn_enabled=True, allow_tf32=False,
    )  # fmt: skip
    return result
