"""An encoder or decoder as CUDA graphs: small images, whose kernels are shorter than their launches, gain most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pronghorn.kernels._recording import Recorded


class GraphedForward:
    """Stands for a module's `forward`: a graph for each shape, dtype and layout it meets, without gradients on a GPU.

    Args:
        module: computes the same for the same input, and does not wait for the GPU.
    """

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward
        self._recorded = Recorded(module.forward)

    def __call__(self, x: Tensor) -> Tensor:
        """What the module gives for x."""
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
        result: Tensor = self._forward(x) if plain else self._recorded(x)
        return result
