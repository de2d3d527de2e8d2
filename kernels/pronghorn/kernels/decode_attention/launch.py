"""What both kernels are launched with: the same arguments in the same order, and room for the parts of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels.decode_attention.call import Call

SHORTEST_STRETCH = 128  # slots of a head that a block takes; fewer cost more to join than they save


@dataclass(frozen=True)
class Launch:
    """One call.

    Attributes:
        arguments: of the kernel, but for its constants.
        out: the result [batch, heads, 1, head_dim].
        parts: of each head: sums [batch * heads * splits, head_dim], peaks and totals [batch * heads * splits].
        grid: blocks: key/value heads of all sequences, and splits of a head.
        paged: whether a cache is in pages.
        started: whether slots at the beginning are not seen.
        extra: whether there is a token that is in no cache.
    """

    arguments: list[Any]
    out: Tensor
    parts: tuple[Tensor, Tensor, Tensor]
    grid: tuple[int, int]
    paged: bool
    started: bool
    extra: bool

    @property
    def splits(self) -> int:
        """Of a head."""
        return self.grid[1]


def prepare(call: Call, *, blocks: int, unit: int = 1) -> Launch:
    """Arguments for a kernel of which `blocks` blocks keep the GPU busy, and whose caches' strides are in `unit`s."""
    query = call.query if call.query.stride(-1) == 1 else call.query.contiguous()
    batch, heads, _, size = query.shape
    kinds = call.head_index.shape[0]
    caches = call.full, call.streaming
    tables = _tables(call.block_table, batch, query.device)
    paged = [table is not None for table in call.block_table]
    pages = [table.shape[1] if of_pages else 1 for table, of_pages in zip(tables, paged, strict=True)]
    splits = _splits(batch, call.full, call.streaming, pages, call.windows, blocks)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    count = batch * heads * splits if splits > 1 else 0
    partial = torch.empty(count, size, dtype=torch.float32, device=query.device)
    peaks, totals = torch.empty(2, count, dtype=torch.float32, device=query.device)
    (full, full_strides), (streaming, streaming_strides) = (_like(tensors, call.bits, unit) for tensors in caches)
    started = any(tensor is not None for tensor in call.start)
    starts = call.lengths  # not read
    if started:
        none = torch.zeros_like(call.lengths[0])
        starts = [none if tensor is None else tensor.contiguous() for tensor in call.start]
    extra = call.key is not None and call.value is not None
    token = [tensor.contiguous() for tensor in (call.key, call.value) if tensor is not None] if extra else [query] * 2
    arguments = [
        query, *full[:2], *streaming[:2], *full[2:], *streaming[2:],
        *(tensor.contiguous() for tensor in call.lengths), *starts, *tables, call.head_index.contiguous(), *token,
        out, partial, peaks, totals, call.scale, call.softcap, kinds, splits, *query.stride()[:2],
        *full_strides, *streaming_strides,
        tables[0].stride(0), call.full[0].shape[2], tables[1].stride(0), call.streaming[0].shape[2], *call.windows,
    ]  # fmt: skip
    return Launch(arguments, out, (partial, peaks, totals), (batch * kinds, splits), any(paged), started, extra)


def _splits(
    batch: int, full: list[Tensor], streaming: list[Tensor], pages: list[int], windows: list[int], blocks: int
) -> int:
    """As many for every head: enough for the long ones to keep the GPU busy; the short ones leave theirs empty."""
    heads = [tensors[0].shape[1] for tensors in (full, streaming)]
    stretches = [
        -(-_seen(tensors[0].shape[2] * count, *windows[2 * kind : 2 * kind + 2]) // SHORTEST_STRETCH)
        for kind, (tensors, count) in enumerate(zip((full, streaming), pages, strict=True))
    ]
    longest = max((count for count, own in zip(stretches, heads, strict=True) if own), default=0)
    long = sum(own for count, own in zip(stretches, heads, strict=True) if count == longest)
    short = sum(count * own for count, own in zip(stretches, heads, strict=True) if count < longest)
    return max(1, min((blocks // batch - short) // max(long, 1), longest))


def _seen(capacity: int, sink: int, recent: int) -> int:
    return capacity if recent < 0 else min(capacity, sink + recent)


def _tables(block_table: list[Tensor | None], batch: int, device: torch.device) -> list[Tensor]:
    """Block tables of both kinds; a cache that is not in pages is one page a sequence where the other is in pages."""
    own = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    return [own if table is None else table.contiguous() for table in block_table]


def _like(tensors: list[Tensor], bits: int, unit: int) -> tuple[list[Tensor], tuple[int, ...]]:
    """Keys, values, and scales and zeros of both, with equal strides; strides of keys, and of scales."""
    key, value = _alike(tensors if bits == 16 else [tensors[0], tensors[3]], unit)
    strides = [stride // unit for stride in key.stride()[:3]]
    if bits == 16:
        return [key, value, *[key] * 4], (*strides, 0, 0)
    scales = [tensor.contiguous() for tensor in (tensors[1], tensors[2], tensors[4], tensors[5])]
    return [key, value, *scales], (*strides, *scales[0].stride()[:2])


def _alike(tensors: list[Tensor], unit: int) -> list[Tensor]:
    first, second = tensors
    fits = first.stride() == second.stride() and first.stride(-1) == 1
    fits = fits and all(stride % unit == 0 for stride in first.stride()[:3])
    return tensors if fits else [tensor.contiguous() for tensor in tensors]
