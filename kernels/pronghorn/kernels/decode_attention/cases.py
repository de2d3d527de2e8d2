"""What is checked and measured of `decode_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.decode_attention import CachedHeads, decode_attention


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    index, size, filled = knobs["index"], knobs["size"], knobs["filled"]
    batch, heads = len(filled), len(index)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def cache(count: int, capacity: int, lengths: list[int]) -> CachedHeads:
        key, value = random(batch, count, capacity, size), random(batch, count, capacity, size)
        for row, length in enumerate(lengths):
            key[row, :, length:] = 1e4  # nobody sees what lies there
        start = torch.arange(batch, dtype=torch.int32, device=device) * 3 if knobs.get("start") else None
        return CachedHeads(key, value, torch.tensor(lengths, dtype=torch.int32, device=device), start)

    streaming = sum(i < 0 for i in index)
    window = knobs["window"]
    arguments = {
        "query": random(batch, 1, heads * knobs["group"], size).transpose(1, 2),
        "full": cache(heads - streaming, knobs["capacity"], filled),
        "streaming": cache(streaming, window, [min(length, window) for length in filled]),
        "head_index": torch.tensor(index, dtype=torch.int32, device=device),
    }
    if knobs.get("extra"):
        arguments |= {"key": random(batch, heads, 1, size), "value": random(batch, heads, 1, size)}
    return arguments


def _oracle(arguments: Arguments) -> Tensor:
    from pronghorn.kernels._operation import to_float64

    exact = to_float64(arguments)
    for name in ("full", "streaming"):
        cache = arguments[name]
        exact[name] = CachedHeads(
            cache.key.cpu().double(), cache.value.cpu().double(), cache.lengths.cpu(),
            None if cache.start is None else cache.start.cpu(),
        )  # fmt: skip
    return decode_attention(**exact)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    slots = sum(min(length, knobs["window"]) if i < 0 else length for i in knobs["index"] for length in knobs["filled"])
    return Cost(2 * 2 * slots * knobs["size"], 4 * slots * knobs["group"] * knobs["size"])


def _shape(
    index: tuple[int, ...], group: int, size: int, capacity: int, filled: list[int], window: int, **more: bool
) -> dict[str, Any]:
    return {"index": index, "group": group, "size": size, "capacity": capacity, "filled": filled, "window": window,
            **more}  # fmt: skip


OPERATION = Operation(
    name="decode_attention",
    function=decode_attention,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape((-1, 0), 2, 16, 40, [33], 12, extra=True),
        _shape((0, 1), 4, 64, 300, [300, 129], 8, start=True),
        _shape((-1, -2, -3), 1, 32, 8, [200, 7], 20, extra=True, start=True),
        _shape((0, -2, 1, -1), 3, 80, 700, [650], 150, extra=True),
        _shape((0,), 8, 128, 64, [1], 4),
    ),
    large=_shape((0, -1, 1, -2, 2, -3, 3, -4), 4, 128, 262144, [262144], 384),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
