"""Definition of attention in which every head has its own kind of sparsity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels._memory import tokens_outside

DENSE, STREAMING = 0, -1  # types of a head


class Rule(NamedTuple):
    """What a streaming head sees, sizes in tokens, and how scores become exponents; block_size 1 is by tokens."""

    sink_size: int
    recent_size: int
    block_size: int
    softcap: float
    scale: float


def window(tokens: int, length: int, sink_size: int, recent_size: int, block_size: int) -> tuple[int, int]:
    """(keys in the sink, reach): the recent keys of query i begin at i // block_size * block_size + reach."""
    sink, recent, offset = (-(-size // block_size) * block_size for size in (sink_size, recent_size, length - tokens))
    return sink, offset + block_size - recent


def visible(
    head_types: Tensor,
    tokens: int,
    length: int,
    *,
    sink_size: int,
    recent_size: int,
    block_size: int = 1,
    start: Tensor | None = None,
) -> Tensor:
    """Which keys the tokens of each head see: bool [batch, or 1 without `start`, heads, tokens, length]."""
    query = torch.arange(tokens, device=head_types.device)[:, None]
    key = torch.arange(length, device=head_types.device)
    first = 0 if start is None else start.view(-1, 1, 1, 1)
    sink, reach = window(tokens, length, sink_size, recent_size, block_size)
    recent = key >= query // block_size * block_size + reach
    everything = (head_types != STREAMING).view(1, -1, 1, 1)
    return (key >= first) & (key <= query + length - tokens) & (recent | (key < first + sink) | everything)


@without_autocast
def head_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, head_types: Tensor, start: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """The result, and log(sum(exp(scores))) [batch, heads, tokens] in float32 or better, -inf where nothing is seen."""
    out, totals = tokens_outside(query), []
    for own, shared in _groups(query, key):
        q, k, v = _wide(query[:, own], key[:, shared], value[:, shared])
        mask = _mask(query, key, head_types[own], start, rule)
        scores = _scores(q, k, rule)
        totals.append(scores.masked_fill(~mask, -torch.inf).logsumexp(dim=-1))
        out[:, own] = (_weights(scores, totals[-1], mask) @ v).to(out.dtype)
    return out, torch.cat(totals, dim=1)


@without_autocast
def backward(
    grad: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_types: Tensor,
    start: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query_grad, key_grad, value_grad = tokens_outside(query), tokens_outside(key), tokens_outside(value)
    for own, shared in _groups(query, key):
        q, k, v, g = _wide(query[:, own], key[:, shared], value[:, shared], grad[:, own])
        mask = _mask(query, key, head_types[own], start, rule)
        scores = _scores(q, k, rule)
        weights = _weights(scores, log_sum_exp[:, own], mask)
        weights_grad = g @ v.mT
        scores_grad = weights * (weights_grad - (weights * weights_grad).sum(dim=-1, keepdim=True))
        if rule.softcap:
            scores_grad = scores_grad * (1 - (scores / rule.softcap) ** 2)
        query_grad[:, own] = (scores_grad @ k * rule.scale).to(query.dtype)
        key_grad[:, shared] = ((scores_grad.mT @ q).sum(dim=1, keepdim=True) * rule.scale).to(key.dtype)
        value_grad[:, shared] = (weights.mT @ g).sum(dim=1, keepdim=True).to(value.dtype)
    return query_grad, key_grad, value_grad


def _groups(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of each key/value head, its query heads and itself: no more scores than that are in memory at once."""
    size = query.shape[1] // key.shape[1]
    for group in range(key.shape[1]):
        yield slice(group * size, (group + 1) * size), slice(group, group + 1)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    # Contiguous, because on a CPU the way a product is added up, and with it the last bit, depends on strides.
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous() for tensor in tensors)


def _mask(query: Tensor, key: Tensor, head_types: Tensor, start: Tensor | None, rule: Rule) -> Tensor:
    sizes = {"sink_size": rule.sink_size, "recent_size": rule.recent_size, "block_size": rule.block_size}
    return visible(head_types, query.shape[2], key.shape[2], **sizes, start=start)


def _scores(query: Tensor, key: Tensor, rule: Rule) -> Tensor:
    scores = query @ key.mT * rule.scale
    return rule.softcap * torch.tanh(scores / rule.softcap) if rule.softcap else scores


def _weights(scores: Tensor, log_sum_exp: Tensor, mask: Tensor) -> Tensor:
    # Where nothing is seen, log_sum_exp is -inf.
    return (scores - log_sum_exp[..., None]).exp().masked_fill(~mask, 0)
