"""What is checked and measured of `cached_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.cached_attention import cached_attention, reference


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, tokens, capacity, filled = knobs["batch"], knobs["tokens"], knobs["capacity"], knobs["filled"]
    shape = (batch, knobs["cached"], capacity, knobs["size"])
    # As attention layers have it: heads and tokens exchanged.
    query = torch.randn(batch, tokens, knobs["cached"] * knobs["group"], knobs["size"], generator=generator)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    key[:, :, filled + tokens :] = 1e4  # nobody sees what lies there
    mask = torch.arange(capacity) <= filled + torch.arange(tokens)[:, None]
    mask = mask.repeat(batch, 1, 1, 1)
    if batch > 1:
        mask[0, ..., : filled // 2] = False  # filled up on the left
    if knobs.get("blind"):
        mask[0, :, 0] = False
    return {
        "query": query.transpose(1, 2).to(device, dtype), "key": key.to(device, dtype),
        "value": value.to(device, dtype), "mask": mask.to(device),
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    exact = to_float64(arguments)
    return reference.cached_attention(**exact, scale=exact["query"].shape[-1] ** -0.5)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    seen = knobs["filled"] + knobs["tokens"]
    heads = knobs["cached"] * knobs["group"]
    cache = 2 * 2 * knobs["batch"] * knobs["cached"] * seen * knobs["size"]
    rows = knobs["batch"] * heads * knobs["tokens"]
    return Cost(cache + 2 * 2 * rows * knobs["size"], 4 * rows * seen * knobs["size"])


def _shape(batch: int, cached: int, group: int, tokens: int, capacity: int, filled: int, size: int) -> dict[str, Any]:
    return {"batch": batch, "cached": cached, "group": group, "tokens": tokens, "capacity": capacity,
            "filled": filled, "size": size}  # fmt: skip


OPERATION = Operation(
    name="cached_attention",
    function=cached_attention,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape(1, 2, 4, 1, 300, 150, 64),
        _shape(2, 1, 4, 1, 129, 128, 64),
        _shape(1, 1, 3, 1, 64, 0, 80),
        _shape(1, 2, 1, 5, 70, 20, 32),
        _shape(2, 1, 4, 40, 333, 100, 16),
        {**_shape(2, 2, 2, 3, 200, 20, 64), "blind": True},
        _shape(1, 1, 8, 33, 1000, 900, 128),
    ),
    large=_shape(1, 8, 4, 1, 8192, 8191, 128),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
