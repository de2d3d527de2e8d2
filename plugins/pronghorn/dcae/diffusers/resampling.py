"""Blocks that halve or double a grid, with what follows their convolution in few passes."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import Tensor, nn

from pronghorn.dcae.diffusers.convolution import (
    convolved,
    convolved_cells,
    shuffled_weight,
    unshuffling_weight,
)
from pronghorn.dcae.diffusers.inference_only import InferenceOnly
from pronghorn.kernels.shuffle_shortcut import shuffle_add, unshuffle_add


class _Derived(InferenceOnly):
    """A block with its convolution, under its own name, and a weight and bias made of those."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)


class FastDownBlock(InferenceOnly):
    """A residual block that halves a grid."""

    def __init__(self, block: DCDownBlock2d) -> None:
        super().__init__()
        self.conv, self.factor = block.conv, block.factor

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, channels, height, width] to [batch, channels of the next stage, height / 2, width / 2]."""
        self.refuse_gradients()
        conv: Any = self._modules["conv"]
        bias = conv._parameters["bias"]
        y = convolved(conv, x, weight=conv._parameters["weight"])
        return unshuffle_add(y, x, factor=self.factor, bias=bias)


class FastStem(_Derived):
    """The first convolution of an encoder that halves the image at once, without a shortcut."""

    def __init__(self, block: DCDownBlock2d) -> None:
        super().__init__(block.conv, *(unshuffling_weight(block.conv) if block.downsample else (None, None)))

    def forward(self, x: Tensor) -> Tensor:
        """An image [batch, 3, height, width] to [batch, channels, height / 2, width / 2]."""
        self.refuse_gradients()
        if self.weight is None:
            return convolved(self.conv, x)
        return convolved_cells(x, self.weight, self.bias)


class FastUpBlock(_Derived):
    """A residual block that doubles a grid. What was to be doubled before a convolution is shuffled after it."""

    def __init__(self, block: DCUpBlock2d) -> None:
        super().__init__(block.conv, *(shuffled_weight(block.conv) if block.interpolate else (None, None)))
        self.factor = block.factor

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, channels, height, width] to [batch, channels of the next stage, height * 2, width * 2]."""
        self.refuse_gradients()
        conv: Any = self._modules["conv"]
        own = conv._parameters if self._buffers["weight"] is None else self._buffers
        return shuffle_add(convolved(conv, x, weight=own["weight"]), x, factor=self.factor, bias=own["bias"])
