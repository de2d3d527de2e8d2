"""What is checked and measured of `rotary_embedding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.rotary_embedding import rotary_embedding


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, tokens, size = knobs["batch"], knobs["tokens"], knobs["size"]
    query, key = (
        torch.randn(batch, tokens, knobs[name], size, generator=generator).transpose(1, 2).to(device, dtype)
        for name in ("heads", "cached")
    )
    angles = torch.randn(knobs.get("angles", batch), tokens, size, generator=generator)
    return {"query": query, "key": key, "cos": angles.cos().to(device, dtype), "sin": angles.sin().to(device, dtype)}


def _oracle(arguments: Arguments) -> tuple[Tensor, Tensor]:
    exact = to_float64(arguments)
    cos, sin = exact["cos"][:, None], exact["sin"][:, None]

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:]], dim=-1)

    return turned(exact["query"]), turned(exact["key"])


def _cost(knobs: Mapping[str, Any]) -> Cost:
    numbers = knobs["batch"] * knobs["tokens"] * (knobs["heads"] + knobs["cached"]) * knobs["size"]
    return Cost(2 * 2 * numbers, 3 * numbers)


def _shape(batch: int, tokens: int, heads: int, cached: int, size: int, **more: int) -> dict[str, int]:
    return {"batch": batch, "tokens": tokens, "heads": heads, "cached": cached, "size": size, **more}


OPERATION = Operation(
    name="rotary_embedding",
    function=rotary_embedding,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape(1, 1, 4, 2, 64),
        _shape(2, 5, 9, 3, 16),
        _shape(3, 2, 1, 1, 80, angles=1),
        _shape(1, 7, 32, 8, 128),
    ),
    large=_shape(1, 4096, 32, 8, 128),
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
)
