"""Definition of the gated depthwise convolution, and of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels._memory import channels_inside, dense


def gated_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[batch, channels, height, width]; in float32 or better, and rounded once."""
    x = dense(x)
    value, gate = _convolve(functional.silu(_wide(x)), weight, bias)
    return halved(x).copy_(value * functional.silu(gate))


def gradients(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias; what came between is computed once more."""
    x = dense(x)
    inputs, grad = _wide(x), _wide(grad)
    activated = functional.silu(inputs)
    value, gate = _convolve(activated, weight, bias)
    of_sums = torch.cat([grad * functional.silu(gate), grad * value * _slope(gate)], dim=1)
    channels = x.shape[1]
    of_activated, of_weight, of_bias = torch.ops.aten.convolution_backward(
        of_sums, activated, weight.to(inputs.dtype), [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels,
        [True] * 3,
    )  # fmt: skip
    return torch.empty_like(x).copy_(of_activated * _slope(inputs)), of_weight.contiguous(), of_bias


def halved(x: Tensor) -> Tensor:
    """Empty [batch, channels / 2, height, width] in the format of a dense one."""
    batch, channels, height, width = x.shape
    last = channels_inside(x) and not x.is_contiguous()
    return torch.empty(
        (batch, channels // 2, height, width), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


@without_autocast
def _convolve(activated: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = activated.dtype
    sums = functional.conv2d(
        activated, weight.to(wide).contiguous(), None if bias is None else bias.to(wide), padding=1,
        groups=activated.shape[1],
    )  # fmt: skip
    value, gate = sums.chunk(2, dim=1)
    return value, gate


def _wide(x: Tensor) -> Tensor:
    """In float32 or better, and contiguous: of channels_last images cuDNN multiplies float32 in fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _slope(x: Tensor) -> Tensor:
    """Of SiLU."""
    gate = x.sigmoid()
    return gate * (1 + x * (1 - gate))
