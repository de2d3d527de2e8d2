"""What a convolution does to its result before it is rounded and stored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Epilogue(NamedTuple):
    """y * scale + shift + residual, and then the ReLU; what is not given is left out.

    Attributes:
        scale: float32 [output channels].
        shift: float32 [output channels].
        residual: [outputs, output channels].
        relu: whether negative numbers become zero.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False

    def __call__(self, y: Tensor) -> Tensor:
        """The definition, in the dtype of `y`."""
        y = y if self.scale is None else y * self.scale
        y = y if self.shift is None else y + self.shift
        y = y if self.residual is None else y + self.residual
        return y.relu() if self.relu else y
