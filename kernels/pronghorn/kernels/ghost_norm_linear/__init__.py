"""Squared norms of the gradients that single trajectories give a linear layer's weight, which are not made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.ghost_norm_linear import reference

__all__ = ["ghost_norm_linear"]


def ghost_norm_linear(
    inputs: Tensor | Sequence[Tensor], output_gradients: Tensor | Sequence[Tensor], lengths: Tensor | None = None
) -> Tensor:
    """The squared Frobenius norm of inputs^T output_gradients, of each trajectory; of several layers their sum.

    Either that product is made a tile at a time, or both Gram matrices over positions are, whose inner product is the
    same: whichever takes fewer multiplications. Products of 16-bit tensors are exact and those of float32 nearly so
    (three products in TF32 for each); they are summed in float32, and squares in float64, in the same order at every
    call. Layers of one shape take one launch. The result has no gradient.

    Args:
        inputs: of the layer, [trajectories, positions, in_features] in fp16, bf16 or fp32 (fp64 in the reference); or
            a sequence of those of several layers, which may differ in all but trajectories.
        output_gradients: of what it gave, [trajectories, positions, out_features]; or as many as there are inputs. Of
            two dtypes the wider counts.
        lengths: int32 [trajectories]: what lies in positions from there on does not matter, NaN neither, and whole
            tiles of it are not computed. What is below 0 counts as 0, what is above `positions` as all. None for all.

    Returns:
        float64 [trajectories].

    Raises:
        ValueError, TypeError: an argument has the wrong length, shape, dtype or device.

    Source: Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679),
        section 4.
    """
    of_layers, gradients = _listed(inputs), _listed(output_gradients)
    if not of_layers or len(gradients) != len(of_layers):
        raise ValueError(f"output_gradients: got {len(gradients)}, wanted one for each of {len(of_layers)} inputs")
    for x, gradient in zip(of_layers, gradients, strict=True):
        check_tensor("inputs", x, dim=3, floating=True, like=of_layers[0])
        check_tensor("output_gradients", gradient, dim=3, floating=True, like=x)
        check_shape("inputs", x, (of_layers[0].shape[0], *x.shape[1:]))
        check_shape("output_gradients", gradient, (*x.shape[:2], gradient.shape[2]))
    if lengths is not None:
        check_tensor("lengths", lengths, like=of_layers[0])
        check_shape("lengths", lengths, (of_layers[0].shape[0],))
        if lengths.dtype != torch.int32:
            raise TypeError(f"lengths: got {lengths.dtype}, wanted torch.int32")
    with torch.no_grad():
        squares: Tensor = _operation(of_layers, gradients, lengths)
    return squares


def _listed(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else [*tensors]


def _forward(inputs: list[Tensor], output_gradients: list[Tensor], lengths: Tensor | None) -> Tensor:
    pairs = list(zip(inputs, output_gradients, strict=True))
    exact = any(torch.float64 in (x.dtype, gradient.dtype) for x, gradient in pairs)
    there = [pair for pair in pairs if pair[0].numel() and pair[1].numel()]
    if use_triton("ghost_norm_linear", inputs[0]) and not exact and there:
        from pronghorn.kernels.ghost_norm_linear import triton

        return triton.ghost_norm_linear(there, lengths)
    squares = [reference.ghost_norm_linear(x.contiguous(), gradient.contiguous(), lengths) for x, gradient in pairs]
    return torch.stack(squares).sum(0)


_operation = define(
    "ghost_norm_linear", _forward, lambda inputs, *_: inputs[0].new_empty(inputs[0].shape[0], dtype=torch.float64)
)
