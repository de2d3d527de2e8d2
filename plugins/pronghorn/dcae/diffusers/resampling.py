"""Blocks that halve or double a grid, with what follows their convolution in one kernel."""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import Tensor, nn
from torch.nn import functional

from pronghorn.kernels.shuffle_shortcut import shuffle_add, unshuffle_add


class FastDownBlock(nn.Module):
    """A residual block that halves a grid."""

    def __init__(self, block: DCDownBlock2d) -> None:
        super().__init__()
        self.conv, self.factor = block.conv, block.factor

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, channels, height, width] to [batch, channels of the next stage, height / 2, width / 2]."""
        return unshuffle_add(self.conv(x), x, factor=self.factor)


class FastUpBlock(nn.Module):
    """A residual block that doubles a grid."""

    def __init__(self, block: DCUpBlock2d) -> None:
        super().__init__()
        self.conv, self.factor = block.conv, block.factor
        self.interpolate, self.interpolation_mode = block.interpolate, block.interpolation_mode

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, channels, height, width] to [batch, channels of the next stage, height * 2, width * 2]."""
        finer = x
        if self.interpolate:
            finer = functional.interpolate(x, scale_factor=self.factor, mode=self.interpolation_mode)
        return shuffle_add(self.conv(finer), x, factor=self.factor)
