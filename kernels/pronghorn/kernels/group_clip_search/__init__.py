"""Search the clipping of each weight group that disturbs a linear's output least."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_bits, check_tensor, resolve_group_size
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.group_clip_search import reference

__all__ = ["group_clip_search"]


def group_clip_search(
    weight: Tensor,
    inputs: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    grid: int = 20,
    max_shrink: float = 0.5,
) -> Tensor:
    """For every row and group the clip maximum with the smallest output error after quantization.

    Tried are `max|w| * (1 - i / grid)` for i = 0 … max_shrink * grid - 1; the first of equally good ones wins. The
    error is mean_t (sum_g x * fakequant(clamp(w)) - sum_g x * w)^2 over the inputs given. Nothing is differentiable.

    Args:
        weight: [N, K] in fp16, bf16, fp32 or fp64.
        inputs: [tokens, K], calibration inputs of the linear; the caller subsamples.
        bits: 2, 3, 4 or 8.
        group_size: input channels a group, a divisor of K; -1 for whole rows.
        symmetric: as in `group_fake_quantize`.
        grid: resolution of the shrinking.
        max_shrink: how far to shrink, in (0, 1].

    Returns:
        [N, K/group_size] in the weight's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or there are no tokens.

    Source: llm-awq's `auto_clip_layer`.
    """
    check_tensor("weight", weight, dim=2, floating=True)
    check_tensor("inputs", inputs, dim=2, floating=True, like=weight)
    check_bits(bits)
    group_size = resolve_group_size(group_size, weight.shape[1])
    if inputs.shape[1] != weight.shape[1] or not inputs.shape[0]:
        raise ValueError(f"inputs: got shape {tuple(inputs.shape)}, wanted [tokens >= 1, {weight.shape[1]}]")
    if grid < 1 or not 0 < max_shrink <= 1 or int(max_shrink * grid) < 1:
        raise ValueError(f"grid, max_shrink: got {grid}, {max_shrink}; wanted at least one step of shrinking")
    steps = int(max_shrink * grid)
    maxima: Tensor = torch.ops.pronghorn.group_clip_search(
        weight.detach(), inputs.detach(), bits, group_size, symmetric, grid, steps
    )
    return maxima


@torch.library.custom_op("pronghorn::group_clip_search", mutates_args=())
def _group_clip_search(
    weight: Tensor, inputs: Tensor, bits: int, group_size: int, symmetric: bool, grid: int, steps: int
) -> Tensor:
    arguments = (bits, group_size, symmetric, grid, steps)
    if use_triton("group_clip_search", weight) and weight.dtype != torch.float64:
        from pronghorn.kernels.group_clip_search import triton

        if group_size <= triton.LARGEST_GROUP:
            return triton.group_clip_search(weight.contiguous(), inputs, *arguments)
    return reference.group_clip_search(weight.contiguous(), inputs, *arguments)


@_group_clip_search.register_fake
def _(weight: Tensor, inputs: Tensor, bits: int, group_size: int, symmetric: bool, grid: int, steps: int) -> Tensor:
    return weight.new_empty(weight.shape[0], weight.shape[1] // group_size)
