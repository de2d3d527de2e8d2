"""Definition of the clip search: shrink each group's largest weight until the output error stops falling."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels.group_fake_quantize.reference import group_fake_quantize

ELEMENTS_AT_A_TIME = 1 << 24


@without_autocast
def group_clip_search(
    weight: Tensor, inputs: Tensor, bits: int, group_size: int, symmetric: bool, grid: int, steps: int
) -> Tensor:
    """Clip maxima [N, K/group_size]; see the public function.

    The error of a group is mean_t (x_t . d)^2 with d = fakequant(clamp(w)) - w, which is d^T H d with the Gram matrix
    H = X^T X / tokens of the group's inputs. With fewer tokens than input channels X itself is the smaller factor.
    """
    rows, columns = weight.shape
    groups = columns // group_size
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = inputs.to(wide).unflatten(1, (groups, group_size)).transpose(0, 1)  # [groups, tokens, group_size]
    tokens = inputs.shape[0]
    gram = x.mT @ x / tokens if tokens > group_size else None
    maxima = torch.empty(rows, groups, dtype=weight.dtype, device=weight.device)
    step = max(1, ELEMENTS_AT_A_TIME // max(columns, groups * min(tokens, group_size)))
    for start in range(0, rows, step):
        part = weight[start : start + step]
        grouped = part.unflatten(1, (groups, group_size))
        largest = grouped.abs().amax(-1, keepdim=True)
        best, smallest_error = largest.clone(), torch.full_like(largest, torch.inf, dtype=wide)
        for index in range(steps):
            limit = largest * (1 - index / grid)
            clamped = grouped.clamp(-limit, limit).flatten(1)
            fake, _, _ = group_fake_quantize(clamped, bits, group_size, symmetric)
            difference = (fake - part).to(wide).unflatten(1, (groups, group_size)).transpose(0, 1)  # [groups, n, g]
            error = (difference @ x.mT).pow(2).mean(-1) if gram is None else (difference @ gram * difference).sum(-1)
            error = error.T[..., None]
            better = error < smallest_error
            best = torch.where(better, limit, best)
            smallest_error = torch.where(better, error, smallest_error)
        maxima[start : start + step] = best.squeeze(-1)
    return maxima
