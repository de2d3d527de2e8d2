"""What backbones are made of."""

from __future__ import annotations

from torch import nn

from pronghorn.torchsparse.nn.activation import ReLU
from pronghorn.torchsparse.nn.convolution import Conv3d
from pronghorn.torchsparse.nn.norm import BatchNorm
from pronghorn.torchsparse.tensor import SparseTensor

Size = int | tuple[int, ...]


class SparseConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, dilation: Size = 1
    ) -> None:
        super().__init__(
            Conv3d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation), BatchNorm(out_channels),
            ReLU(True),
        )  # fmt: skip


class SparseConvTransposeBlock(nn.Sequential):
    """Transposed convolution, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, dilation: Size = 1
    ) -> None:
        super().__init__(
            Conv3d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, transposed=True),
            BatchNorm(out_channels), ReLU(True),
        )  # fmt: skip


class SparseResBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, dilation: Size = 1
    ) -> None:
        super().__init__()
        self.main = nn.Sequential(
            Conv3d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation), BatchNorm(out_channels),
            ReLU(True), Conv3d(out_channels, out_channels, kernel_size, dilation=dilation), BatchNorm(out_channels),
        )  # fmt: skip
        same = in_channels == out_channels and (stride == 1 or stride == (1, 1, 1))
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(Conv3d(in_channels, out_channels, 1, stride=stride), BatchNorm(out_channels))
        )
        self.relu = ReLU(True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The block of a tensor."""
        result: SparseTensor = self.relu(self.main(x) + self.shortcut(x))
        return result
