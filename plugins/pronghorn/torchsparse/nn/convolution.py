"""The convolution layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from pronghorn.torchsparse.config import ConvConfig
from pronghorn.torchsparse.conv import conv3d
from pronghorn.torchsparse.quantize import make_ntuple
from pronghorn.torchsparse.tensor import SparseTensor


class SparseConvolution(nn.Module):
    """Convolution at occupied sites.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one number, or one for each dimension.
        stride: likewise.
        padding: likewise; on odd edges without a stride the kernel is centred, whatever this says.
        dilation: likewise.
        bias: add one.
        transposed: go back to the sites that a convolution of the same kernel size, stride and dilation came from.
        generative: a transposed one that makes new sites.
        config: how it is computed; by default `get_global_config()` at each call.

    Source: Tang et al. (MICRO 2023), section 2.
    """

    ndim = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        transposed: bool = False,
        generative: bool = False,
        config: ConvConfig | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted a positive number")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = (
            make_ntuple(value, self.ndim, name=name)
            for name, value in (
                ("kernel_size", kernel_size), ("stride", stride), ("padding", padding), ("dilation", dilation)
            )
        )  # fmt: skip
        self.transposed, self.generative = transposed or generative, generative
        self.config = config
        self.kernel_volume = math.prod(self.kernel_size)
        pointwise = self.kernel_volume == 1 and max(self.stride) == 1
        shape = (in_channels, out_channels) if pointwise else (self.kernel_volume, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights anew, as the library does."""
        channels = self.out_channels if self.transposed else self.in_channels
        bound = 1 / math.sqrt(channels * self.kernel_volume)
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """The convolution of a tensor."""
        return conv3d(
            input, self.kernel, self.kernel_size, self.bias, self.stride, self.padding, self.dilation, self.config,
            self.transposed, self.generative,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What tells layers apart."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if set(getattr(self, name)) != {default}:
                parts.append(f"{name}={getattr(self, name)}")
        parts += ["bias=False"] if self.bias is None else []
        parts += [name for name in ("transposed", "generative") if getattr(self, name)]
        return ", ".join(parts)


class Conv1d(SparseConvolution):
    """Convolution in one dimension."""

    ndim = 1


class Conv2d(SparseConvolution):
    """Convolution in two dimensions."""

    ndim = 2


class Conv3d(SparseConvolution):
    """Convolution in three dimensions."""

    ndim = 3


class Conv4d(SparseConvolution):
    """Convolution in four dimensions."""

    ndim = 4
