"""A residual encoder, as in detection."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.torchsparse.backbones.blocks import Size, SparseConvBlock, SparseResBlock
from pronghorn.torchsparse.tensor import SparseTensor


class SparseResNet(nn.ModuleList):
    """Stages, each with a convolution and then residual blocks.

    Args:
        blocks: of each stage, how many blocks, their channels, kernel size and the first one's stride.
        in_channels: of the input.
        width_multiplier: of all channels.

    Returns:
        The output of each stage, as a list.
    """

    def __init__(
        self, blocks: list[tuple[int, int, Size, Size]], *, in_channels: int = 4, width_multiplier: float = 1.0
    ) -> None:
        super().__init__()
        for count, channels, kernel_size, stride in blocks:
            channels = int(channels * width_multiplier)
            first = SparseConvBlock(in_channels, channels, kernel_size, stride=stride)
            rest = [SparseResBlock(channels, channels, kernel_size) for _ in range(count - 1)]
            self.append(nn.Sequential(first, *rest))
            in_channels = channels

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """The tensor after each stage."""
        outputs = []
        for stage in self:
            x = stage(x)
            outputs.append(x)
        return outputs


class SparseResNet21D(SparseResNet):
    """Twenty-one layers in five stages, the last of which halves the second dimension."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            [(3, 16, 3, 1), (3, 32, 3, 2), (3, 64, 3, 2), (3, 128, 3, 2), (1, 128, (1, 3, 1), (1, 2, 1))], **options
        )
