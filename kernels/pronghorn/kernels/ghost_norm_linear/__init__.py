"""Squared norms of the gradients that single trajectories give a linear layer's weight, which are not made."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.ghost_norm_linear import reference

__all__ = ["ghost_norm_linear"]


def ghost_norm_linear(inputs: Tensor, output_gradients: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The squared Frobenius norm of inputs^T output_gradients, of each trajectory.

    Either that product is made a tile at a time, or both Gram matrices over positions are, whose inner product is the
    same: whichever takes fewer multiplications. Products of 16-bit tensors are exact and those of float32 nearly so
    (three products in TF32 for each); they are summed in float32, and squares in float64, in the same order at every
    call. The result has no gradient.

    Args:
        inputs: of the layer, [trajectories, positions, in_features] in fp16, bf16 or fp32 (fp64 in the reference).
        output_gradients: of what it gave, [trajectories, positions, out_features]. Of two dtypes the wider counts.
        lengths: int32 [trajectories]: what lies in positions from there on does not matter, NaN neither, and whole
            tiles of it are not computed. What is below 0 counts as 0, what is above `positions` as all. None for all.

    Returns:
        float64 [trajectories].

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679),
        section 4.
    """
    check_tensor("inputs", inputs, dim=3, floating=True)
    check_tensor("output_gradients", output_gradients, dim=3, floating=True, like=inputs)
    check_shape("output_gradients", output_gradients, (*inputs.shape[:2], output_gradients.shape[2]))
    if lengths is not None:
        check_tensor("lengths", lengths, like=inputs)
        check_shape("lengths", lengths, (inputs.shape[0],))
        if lengths.dtype != torch.int32:
            raise TypeError(f"lengths: got {lengths.dtype}, wanted torch.int32")
    inputs, output_gradients = (one.detach() if one.requires_grad else one for one in (inputs, output_gradients))
    squares: Tensor = _operation(inputs, output_gradients, lengths)
    return squares


def _forward(inputs: Tensor, output_gradients: Tensor, lengths: Tensor | None) -> Tensor:
    exact = torch.float64 in (inputs.dtype, output_gradients.dtype)
    there = inputs.numel() > 0 and output_gradients.numel() > 0
    if use_triton("ghost_norm_linear", inputs) and not exact and there:
        from pronghorn.kernels.ghost_norm_linear import triton

        return triton.ghost_norm_linear(inputs, output_gradients, lengths)
    return reference.ghost_norm_linear(inputs, output_gradients, lengths)


_operation = define(
    "ghost_norm_linear", _forward, lambda inputs, *_: inputs.new_empty(inputs.shape[0], dtype=torch.float64)
)
