"""What is checked and measured of `cache_write`: what a cache holds afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.cache_write import cache_write


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    tokens, heads, size = knobs["tokens"], knobs["heads"], knobs["size"]
    key, value = (
        torch.randn(tokens, heads, width, generator=generator).to(device, dtype)
        for width in (size, knobs.get("value", size))
    )
    slots = torch.randperm(knobs["pages"] * knobs["page_size"], generator=generator)[:tokens]
    slots[1::4] = -1  # not to be written
    return {"key": key, "value": value, "slots": slots.to(device), "pages": knobs["pages"],
            "page_size": knobs["page_size"]}  # fmt: skip


def _caches(key: Tensor, value: Tensor, pages: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Zeros; keys and values of a slot lie side by side, as in vLLM."""
    size = key.shape[2]
    shape = pages, key.shape[1], page_size, size + value.shape[2]
    both = torch.zeros(shape, dtype=key.dtype, device=key.device)
    return both[..., :size], both[..., size:]


def _written(key: Tensor, value: Tensor, slots: Tensor, pages: int, page_size: int) -> tuple[Tensor, Tensor]:
    caches = _caches(key, value, pages, page_size)
    cache_write(key, value, *caches, slots)
    return caches


def _oracle(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Token by token."""
    exact = to_float64(arguments)
    caches = _caches(exact["key"], exact["value"], exact["pages"], exact["page_size"])
    for token, slot in enumerate(exact["slots"].tolist()):
        if slot >= 0:
            for cache, tensor in zip(caches, (exact["key"], exact["value"]), strict=True):
                cache[slot // exact["page_size"], :, slot % exact["page_size"]] = tensor[token]
    return caches


def _cost(knobs: Mapping[str, Any]) -> Cost:
    return Cost(2 * 2 * knobs["tokens"] * knobs["heads"] * (knobs["size"] + knobs.get("value", knobs["size"])), 0)


def _shape(tokens: int, heads: int, size: int, pages: int, page_size: int, **more: int) -> dict[str, int]:
    return {"tokens": tokens, "heads": heads, "size": size, "pages": pages, "page_size": page_size, **more}


OPERATION = Operation(
    name="cache_write",
    function=_written,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape(1, 2, 64, 3, 16),
        _shape(9, 3, 80, 4, 5),
        _shape(6, 1, 24, 2, 4, value=16),
    ),
    large=_shape(8192, 8, 128, 1024, 16),
    cost=_cost,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
)
