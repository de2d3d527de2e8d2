"""Definition of adding weighted gradients to buffers."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_grad_accum(
    gradients: list[Tensor], accum: list[Tensor], score: list[Tensor], accum_weight: float, score_weight: float
) -> Tensor:
    """The sum of squares of all gradients; an empty `score` is left out."""
    torch._foreach_add_(accum, gradients, alpha=accum_weight)
    if score:
        torch._foreach_add_(score, gradients, alpha=score_weight)
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
