"""Definition of attention of one new token over caches of two kinds of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels.decode_attention.call import Call
from pronghorn.kernels.kv_quantize.reference import kv_dequantize


@without_autocast
def decode_attention(call: Call) -> Tensor:
    """[batch, heads, 1, head_dim]; in float32 or better, and rounded once."""
    groups = call.query.unflatten(1, (call.head_index.shape[0], -1))  # [batch, key/value heads, group, 1, head_dim]
    result = torch.empty_like(groups)
    for kind, tensors in enumerate((call.full, call.streaming)):
        heads = _heads_of(call.head_index, kind, tensors[0].shape[1])
        if heads.numel():
            table, (sink, recent) = call.block_table[kind], call.windows[2 * kind : 2 * kind + 2]
            capacity = _capacity(tensors[0], table)
            slots, seen = _slots(capacity, call.lengths[kind], call.start[kind], sink, recent)
            keys, values = _cached(tensors, table, slots, call.query, call.bits)
            token = None if call.key is None or call.value is None else (call.key[:, heads], call.value[:, heads])
            result[:, heads] = _attend(groups[:, heads], keys, values, seen, token, call.scale, call.softcap)
    return result.flatten(1, 2).contiguous()


def _heads_of(head_index: Tensor, kind: int, count: int) -> Tensor:
    """Where the heads of a kind are in the model, in the order of their cache."""
    places = torch.empty(count, dtype=torch.long, device=head_index.device)
    own = head_index < 0 if kind else head_index >= 0
    rank = (-1 - head_index if kind else head_index).long()
    places[rank[own]] = own.nonzero()[:, 0]
    return places


def _capacity(tensor: Tensor, table: Tensor | None) -> int:
    return tensor.shape[2] * (1 if table is None else table.shape[1])


def _slots(
    capacity: int, lengths: Tensor, start: Tensor | None, sink: int, recent: int
) -> tuple[Tensor | None, Tensor]:
    """[batch, count] slots to look at, None for all in their order; and which of them are seen."""
    filled = lengths.clamp(max=capacity)[:, None].long()
    if recent < 0 or sink + recent >= capacity:
        slots, place = None, torch.arange(capacity, device=lengths.device)
        seen = place < filled
    else:
        place = torch.arange(sink + recent, device=lengths.device)
        passed_over = (filled - sink - recent).clamp(min=0)
        slots, seen = place + (place >= sink) * passed_over, place < filled
    if recent >= 0 and slots is None:
        seen = seen & ((place < sink) | (place >= filled - recent))
    if start is not None:
        seen = seen & ((place if slots is None else slots) >= start[:, None])
    return slots, seen


def _cached(
    tensors: list[Tensor], table: Tensor | None, slots: Tensor | None, query: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, heads, slots, head_dim], out of their pages and in wide floating point."""
    if slots is not None:
        row = torch.arange(slots.shape[0], device=slots.device)[:, None]
        size = tensors[0].shape[2]
        page, inner = (row, slots) if table is None else (table[row, slots // size], slots % size)
        tensors = [tensor[page, :, inner].transpose(1, 2) for tensor in tensors]
    elif table is not None:
        tensors = [tensor[table].transpose(1, 2).flatten(2, 3) for tensor in tensors]
    # Contiguous, because on a CPU the way a product is added up, and with it the last bit, depends on strides.
    wide = torch.promote_types(query.dtype, torch.float32)
    if bits == 16:
        return tensors[0].to(wide).contiguous(), tensors[1].to(wide).contiguous()
    key, value = (kv_dequantize(*part, bits=bits, dtype=wide) for part in _halves(tensors))
    return key, value


def _halves(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    key, key_scale, key_zero, value, value_scale, value_zero = tensors
    return [(key, key_scale, key_zero), (value, value_scale, value_zero)]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, extra: tuple[Tensor, Tensor] | None, scale: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    if extra is not None:
        key, value = torch.cat([key, extra[0].to(key.dtype)], dim=2), torch.cat([value, extra[1].to(key.dtype)], dim=2)
        seen = torch.cat([seen, seen.new_ones(seen.shape[0], 1)], dim=1)
    scores = query[:, :, :, 0].to(key.dtype).contiguous() @ key.mT * scale  # [batch, heads, group, slots]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~seen.any(dim=-1)[:, None, None, None], 0)  # softmax of nothing is NaN
    # What lies in unseen slots may be no number, and would stay so when multiplied by 0.
    value = value.masked_fill(~seen[:, None, :, None], 0)
    return (weights @ value)[:, :, :, None].to(query.dtype)
