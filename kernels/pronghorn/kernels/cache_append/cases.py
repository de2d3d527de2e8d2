"""What is checked and measured of `cache_append`: what the caches hold after a few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.cache_append import cache_append
from pronghorn.kernels.decode_attention import CachedHeads


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    index, size, written = knobs["index"], knobs["size"], knobs["written"]
    shape = (len(written), len(index), 1, size)
    key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return {
        "key": key, "value": value, "head_index": torch.tensor(index, dtype=torch.int32, device=device),
        "written": torch.tensor(written, dtype=torch.int32, device=device),
        "capacity": knobs["capacity"], "streams": sum(i < 0 for i in index),
        "sink_size": knobs["sink"], "recent_size": knobs["recent"],
    }  # fmt: skip


def _appended(
    key: Tensor,
    value: Tensor,
    head_index: Tensor,
    written: Tensor,
    capacity: int,
    streams: int,
    sink_size: int,
    recent_size: int,
) -> tuple[Tensor, ...]:
    """Both caches and their lengths after the token was written, into zeros."""
    batch, heads, _, size = key.shape
    full, streaming = (
        CachedHeads(key.new_zeros(shape), key.new_zeros(shape), written.clone())
        for shape in ((batch, heads - streams, capacity, size), (batch, streams, sink_size + recent_size, size))
    )
    cache_append(key, value, full, streaming, head_index, sink_size=sink_size, recent_size=recent_size)
    lengths = [cache.lengths.to(key.dtype) for cache in (full, streaming)]
    return full.key, full.value, streaming.key, streaming.value, *lengths


def _oracle(arguments: Arguments) -> tuple[Tensor, ...]:
    """Slot by slot."""
    exact = to_float64(arguments)
    key, value, index, capacity = (exact[name] for name in ("key", "value", "head_index", "capacity"))
    sink, recent = exact["sink_size"], exact["recent_size"]
    streams = exact["streams"]
    batch, heads, _, size = key.shape
    full = key.new_zeros(2, batch, heads - streams, capacity, size)
    streaming = key.new_zeros(2, batch, streams, sink + recent, size)
    for row, count in enumerate(exact["written"].tolist()):
        slot = count if count < sink else sink + (count - sink) % recent
        for head, rank in enumerate(index.tolist()):
            for half, tensor in enumerate((key, value)):
                if rank < 0:
                    streaming[half, row, -1 - rank, slot] = tensor[row, head, 0]
                elif count < capacity:
                    full[half, row, rank, count] = tensor[row, head, 0]
    lengths = exact["written"].double() + 1
    return *full.unbind(), *streaming.unbind(), lengths, lengths


def _cost(knobs: Mapping[str, Any]) -> Cost:
    return Cost(2 * 2 * 2 * len(knobs["index"]) * len(knobs["written"]) * knobs["size"], 0)


OPERATION = Operation(
    name="cache_append",
    function=_appended,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"index": (-1, 0), "size": 16, "written": [3], "capacity": 9, "sink": 2, "recent": 4},
        {"index": (0, -2, 1, -1), "size": 64, "written": [1, 30, 9], "capacity": 20, "sink": 2, "recent": 5},
        {"index": (-1, -2), "size": 80, "written": [6, 0], "capacity": 3, "sink": 0, "recent": 3},
        {"index": (0,), "size": 128, "written": [7], "capacity": 8, "sink": 1, "recent": 1},
    ),
    large={"index": (0, -1, 1, -2, 2, -3, 3, -4), "size": 128, "written": [65535], "capacity": 65536, "sink": 128,
           "recent": 256},
    cost=_cost,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
)  # fmt: skip
