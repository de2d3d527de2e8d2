"""Definition of attention of several branches over one observation, and of its gradients.

Rows are the tokens of all heads of a group, as one matrix a key/value head: of the prefix [batch, groups, rows,
head_dim], of branches [batch, groups, branches, rows, head_dim].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


class Tensors(NamedTuple):
    """Of the prefix [batch, tokens, heads, head_dim], of branches [batch, branches, tokens, heads, head_dim]."""

    prefix_query: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    branch_query: Tensor
    branch_key: Tensor
    branch_value: Tensor


@without_autocast
def shared_observation_attention(
    tensors: Tensors, prefix_mask: Tensor, branch_mask: Tensor, state_tokens: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of prefix and branches, and log(sum(exp(scores))) of both, [..., tokens, heads] in float32 or better.

    These are infinite for a token that is masked out: exp(score - inf) is the weight 0.
    """
    rows = _folded(tensors, prefix_mask, branch_mask)
    scores, shared, own = _scores(rows, prefix_mask, state_tokens, scale)
    prefix_total, branch_total = _totals(scores, shared, own, prefix_mask, branch_mask)
    prefix_out = _weights(scores, prefix_total) @ rows.prefix_value
    branch_out = _weights(shared, branch_total) @ rows.prefix_value[:, :, None]
    branch_out = branch_out + _weights(own, branch_total) @ rows.branch_value
    prefix, branches = tensors.prefix_query, tensors.branch_query
    return (
        _unfolded(prefix_out, prefix).to(prefix.dtype), _unfolded(branch_out, branches).to(branches.dtype),
        _unfolded(prefix_total[..., None], prefix)[..., 0], _unfolded(branch_total[..., None], branches)[..., 0],
    )  # fmt: skip


@without_autocast
def gradients(
    prefix_grad: Tensor, branch_grad: Tensor, prefix_total: Tensor, branch_total: Tensor,
    tensors: Tensors, prefix_mask: Tensor, branch_mask: Tensor, state_tokens: int, scale: float,
) -> Tensors:  # fmt: skip
    """Of all six tensors, in their dtypes."""
    rows, groups = _folded(tensors, prefix_mask, branch_mask), tensors.prefix_key.shape[2]
    grad, branches_grad = _fold(_real(prefix_grad, prefix_mask), groups), _fold(_real(branch_grad, branch_mask), groups)
    totals = _fold(prefix_total[..., None], groups)[..., 0], _fold(branch_total[..., None], groups)[..., 0]
    scores, shared, own = _scores(rows, prefix_mask, state_tokens, scale)
    weights = _weights(scores, totals[0])
    shared_weights, own_weights = _weights(shared, totals[1]), _weights(own, totals[1])

    scores_grad = _scores_grads(weights, grad @ rows.prefix_value.mT)[0] * scale
    shared_grad, own_grad = _scores_grads(
        shared_weights, branches_grad @ rows.prefix_value[:, :, None].mT, own_weights,
        branches_grad @ rows.branch_value.mT,
    )  # fmt: skip
    shared_grad, own_grad = shared_grad * scale, own_grad * scale
    found = Tensors(
        scores_grad @ rows.prefix_key,
        scores_grad.mT @ rows.prefix_query + (shared_grad.mT @ rows.branch_query).sum(dim=2),
        weights.mT @ grad + (shared_weights.mT @ branches_grad).sum(dim=2),
        shared_grad @ rows.prefix_key[:, :, None] + own_grad @ rows.branch_key,
        own_grad.mT @ rows.branch_query,
        own_weights.mT @ branches_grad,
    )
    return Tensors(*(_unfolded(rows, like).to(like.dtype) for rows, like in zip(found, tensors, strict=True)))


def _folded(tensors: Tensors, prefix_mask: Tensor, branch_mask: Tensor) -> Tensors:
    groups, masks = tensors.prefix_key.shape[2], [prefix_mask] * 3 + [branch_mask] * 3
    return Tensors(*(_fold(_real(tensor, mask), groups) for tensor, mask in zip(tensors, masks, strict=True)))


def _real(tensor: Tensor, mask: Tensor) -> Tensor:
    """With zeros for what is masked out, which may be no numbers."""
    return tensor.masked_fill(~mask.view(*mask.shape, *[1] * (tensor.dim() - 2)), 0)


def _fold(tensor: Tensor, groups: int) -> Tensor:
    """[batch, ..., tokens, heads, size] to [batch, groups, ..., tokens * heads / groups, size], wide."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    # Contiguous, because on a CPU the way a product is added up, and with it the last bit, depends on strides.
    rows: Tensor = wide.unflatten(-2, (groups, -1)).movedim(-3, 1).flatten(-3, -2)
    return rows.contiguous()


def _unfolded(rows: Tensor, like: Tensor) -> Tensor:
    """The counterpart of `_fold`, with the tokens and heads of `like`."""
    tokens, heads = like.shape[-3:-1]
    unfolded: Tensor = rows.unflatten(-2, (tokens, heads // rows.shape[1])).movedim(1, -3).flatten(-3, -2)
    return unfolded.contiguous()


def _scores(rows: Tensors, prefix_mask: Tensor, state_tokens: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of prefix and prefix, branches and prefix, branches and themselves; -inf where a row does not see a key."""
    absent = ~prefix_mask[:, None, None]
    scores = (rows.prefix_query @ rows.prefix_key.mT * scale).masked_fill(absent, -torch.inf)
    shared = rows.branch_query @ rows.prefix_key[:, :, None].mT * scale
    own = rows.branch_query @ rows.branch_key.mT * scale
    tokens = own.shape[-1]
    of_state = torch.arange(tokens, device=own.device) < state_tokens
    apart = of_state[:, None] & ~of_state
    group = own.shape[-2] // tokens if tokens else 1
    apart = apart.repeat_interleave(group, dim=0)
    return scores, shared.masked_fill(absent[:, None], -torch.inf), own.masked_fill(apart, -torch.inf)


def _totals(
    scores: Tensor, shared: Tensor, own: Tensor, prefix_mask: Tensor, branch_mask: Tensor
) -> tuple[Tensor, Tensor]:
    group = scores.shape[-2] // prefix_mask.shape[1] if prefix_mask.shape[1] else 1
    real = prefix_mask.repeat_interleave(group, dim=1)[:, None]
    prefix = scores.logsumexp(dim=-1).masked_fill(~real, torch.inf)
    branches = torch.cat([shared, own], dim=-1).logsumexp(dim=-1)
    return prefix, branches.masked_fill(~branch_mask[:, None, :, None], torch.inf)


def _weights(scores: Tensor, total: Tensor) -> Tensor:
    return (scores - total[..., None]).exp()


def _scores_grads(*pairs: Tensor) -> list[Tensor]:
    """Of parts of one softmax, given as weights, their gradients, weights, …"""
    weights, grads = pairs[::2], pairs[1::2]
    mean = sum((w * g).sum(dim=-1, keepdim=True) for w, g in zip(weights, grads, strict=True))
    return [w * (g - mean) for w, g in zip(weights, grads, strict=True)]
