"""Definition of writing a token to two caches."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.kv_quantize.reference import kv_quantize


def cache_append(
    key: Tensor,
    value: Tensor,
    full: list[Tensor],
    streaming: list[Tensor],
    full_lengths: Tensor,
    streaming_lengths: Tensor,
    head_index: Tensor,
    sink_size: int,
    recent_size: int,
    bits: int,
) -> None:
    """In place."""
    size = key.shape[-1]
    parts = [key, value] if bits == 16 else [*kv_quantize(key, bits, size), *kv_quantize(value, bits, size)]
    ring = sink_size + (streaming_lengths - sink_size) % recent_size
    ring = torch.where(streaming_lengths < sink_size, streaming_lengths, ring)
    for tensors, slots, kind in ((full, full_lengths, head_index >= 0), (streaming, ring, head_index < 0)):
        heads = kind.nonzero()[:, 0]
        rank = (head_index if tensors is full else -1 - head_index)[heads].long()
        rows = (slots < tensors[0].shape[2]).nonzero()[:, 0]
        for stored, part in zip(tensors, parts, strict=True):
            stored[rows[:, None], rank, slots[rows].long()[:, None]] = part[rows][:, heads, 0].to(stored.dtype)
    full_lengths += 1
    streaming_lengths += 1
