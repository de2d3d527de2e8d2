"""Definition of the squared norms of a linear layer's gradients, in the two ways there are."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


@without_autocast
def ghost_norm_linear(inputs: Tensor, output_gradients: Tensor, lengths: Tensor | None) -> Tensor:
    """float64 [trajectories]."""
    _, positions, in_features = inputs.shape
    left, right = (_precise(tensor, lengths) for tensor in (inputs, output_gradients))
    wide = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(wide), right.to(wide)
    if positions * (in_features + right.shape[2]) < in_features * right.shape[2]:
        return ((left @ left.mT).double() * (right @ right.mT).double()).sum(dim=(1, 2))
    squares = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    for index in range(len(left)):  # one at a time, for each product is as large as the layer's weight
        squares[index] = (left[index].T @ right[index]).double().square().sum()
    return squares


def _precise(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """In float32 or better, with zeros from the length on."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if lengths is None:
        return tensor
    return torch.where((torch.arange(tensor.shape[1], device=tensor.device) < lengths[:, None])[..., None], tensor, 0)
