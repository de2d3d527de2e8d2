"""Definition of adding weighted gradients to buffers."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_grad_accum(gradients: list[Tensor], accum: list[Tensor], score: list[Tensor], weights: Tensor) -> Tensor:
    """The sum of squares of all gradients; an empty `score` is left out."""
    in_accum, in_score = weights.tolist()
    torch._foreach_add_(accum, gradients, alpha=in_accum)
    if score:
        torch._foreach_add_(score, gradients, alpha=in_score)
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
