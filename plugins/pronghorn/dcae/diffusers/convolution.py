"""Convolutions for inference, with their bias and what follows them in as few passes over memory as may be.

PyTorch adds a bias in a pass of its own, which on large images takes as long as the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional

from pronghorn.kernels.bias_activation import bias_activation
from pronghorn.kernels.fused_convolution import fused_convolution, runs_fused


def convolved(
    conv: nn.Conv2d, x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """activation(conv(x) + residual).

    Args:
        conv: of groups or none, with or without a bias.
        x: [batch, channels, height, width].
        weight: instead of the convolution's own.
        bias: likewise, with a weight.
        residual: in the shape of the result.
        activation: None, "relu" or "silu".
    """
    if weight is None:  # by name, for as attributes they take several times as long, which small images notice
        own = conv._parameters
        weight, bias = own["weight"], own["bias"]
    assert weight is not None  # noqa: S101 - a convolution has one
    padding: Any = conv.padding
    if fuses(conv, x, weight):
        return fused_convolution(x, weight, bias, residual=residual, activation=activation)
    if bias is not None and residual is None:
        if activation is None and _of_pixels(conv, x):
            return functional.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        if activation == "relu" and in_cudnn(x):
            result: Tensor = torch.cudnn_convolution_relu(
                x, weight, bias, conv.stride, padding, conv.dilation, conv.groups
            )
            return result
    y = torch.conv2d(x, weight, None, conv.stride, padding, conv.dilation, conv.groups)
    if bias is None and residual is None and activation is None:
        return y
    return bias_activation(y, bias, residual=residual, activation=activation)


def fuses(conv: nn.Conv2d, x: Tensor, weight: Tensor, *, norm: RMSNorm | None = None) -> bool:
    """Whether the kernel of this library is the fast way for a convolution of x and what follows it."""
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or weight.dtype != x.dtype:
        return False
    if norm is not None and (norm.weight is None or norm.weight.dtype != x.dtype):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and runs_fused(x, weight, normed=norm is not None)


def in_cudnn(x: Tensor) -> bool:
    """Whether cuDNN may compute a convolution with what follows it: for inference, and not in float64."""
    there = x.is_cuda and torch.version.hip is None and torch.backends.cudnn.enabled
    return there and x.dtype != torch.float64 and not torch.is_grad_enabled()


def _of_pixels(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether it is a matrix product with the channels of pixels, which lie side by side."""
    alone = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and not any(conv.padding)
    return alone and x.is_contiguous(memory_format=torch.channels_last)


def convolved_cells(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 4 x 4 convolution of stride 2 with a margin of 1, as a product with all numbers that its kernel covers.

    For few channels, as an image has: cuDNN has no fast kernel for three.

    Args:
        x: [batch, channels, height, width], both sizes even.
        weight: [results, channels, 4, 4].
        bias: [results], or None.
    """
    batch, channels, height, width = x.shape
    lying = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, _ = lying.stride()
    shape = batch, height // 2, width // 2, 4, 4 * channels  # adjacent pixels of a row lie side by side
    below = lying.as_strided(shape, (image, 2 * row, 2 * column, row, 1)).flatten(3)
    return functional.linear(below, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


@torch.no_grad()
def unshuffling_weight(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the 4 x 4 convolution of stride 2 that is a 3 x 3 one and `pixel_unshuffle` by 2 after it.

    Place (i, j) of a cell is a channel of its own, whose 3 x 3 numbers stand i lower and j further right.
    """
    channels, given = conv.weight.shape[:2]
    weight = conv.weight.new_zeros(channels, 4, given, 4, 4)
    for i in range(2):
        for j in range(2):
            weight[:, 2 * i + j, :, i : i + 3, j : j + 3] = conv.weight
    return weight.flatten(0, 1), None if conv.bias is None else conv.bias.repeat_interleave(4)


@torch.no_grad()
def shuffled_weight(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the 3 x 3 convolution before `pixel_shuffle` by 2 that is `conv` on pixels doubled each way.

    Of three adjacent doubled pixels two are the same one, and their weights are summed up, in float32.
    """
    channels, given = conv.weight.shape[:2]
    weight = conv.weight.new_zeros(channels, 4, given, 3, 3, dtype=torch.float32)
    for i in range(2):
        for j in range(2):
            for row in range(3):
                for column in range(3):
                    # From place i of a pixel, `row - 1` further is this many pixels further.
                    y, x = (i + row - 1) // 2 + 1, (j + column - 1) // 2 + 1
                    weight[:, 2 * i + j, :, y, x] += conv.weight[:, :, row, column]
    weight = weight.flatten(0, 1).to(conv.weight.dtype)
    return weight, None if conv.bias is None else conv.bias.repeat_interleave(4)
