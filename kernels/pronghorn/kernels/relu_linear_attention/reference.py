"""Definition of linear attention with ReLU, in its two halves, and of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


@without_autocast
def key_value_state(k: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, head_dim + 1, head_dim] in float32 or better."""
    keys, values = _wide(k).relu(), _wide(v)
    return torch.cat([values.mT @ keys, keys.sum(dim=2, keepdim=True)], dim=2)


@without_autocast
def attend_state(q: Tensor, state: Tensor, eps: float) -> Tensor:
    """[batch, heads, tokens, head_dim]; in float32 or better, and rounded once."""
    sums = _wide(q).relu() @ state.mT
    return _like(q, sums[..., :-1] / (sums[..., -1:] + eps))


@without_autocast
def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v; what depends on the weights' sum goes through the state's last row."""
    queries, keys, values, grad = _wide(q).relu(), _wide(k).relu(), _wide(v), _wide(grad)
    state = key_value_state(k, v)
    sums = queries @ state.mT
    weight = sums[..., -1:] + eps
    of_values = grad / weight
    of_sums = torch.cat([of_values, -(of_values * sums[..., :-1] / weight).sum(dim=3, keepdim=True)], dim=3)
    # A query that is all zeros is divided by eps alone; what it would give the state is zero times that.
    of_sums = torch.where((queries > 0).any(dim=3, keepdim=True), of_sums, 0)
    of_queries = of_sums @ state
    of_state = of_sums.mT @ queries
    of_keys = values @ of_state[:, :, :-1] + of_state[:, :, -1:]
    of_values = keys @ of_state[:, :, :-1].mT
    return _like(q, of_queries * (queries > 0)), _like(k, of_keys * (keys > 0)), _like(v, of_values)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better, and contiguous: the same bits for all strides."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """In the dtype of a tensor, and in memory as it is."""
    return torch.empty_like(tensor).copy_(values)
