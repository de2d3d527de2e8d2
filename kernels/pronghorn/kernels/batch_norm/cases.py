"""What is checked and measured of `batch_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.batch_norm import batch_norm


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    rows, count, channels = (knobs[name] for name in ("rows", "count", "channels"))
    x = torch.randn(rows, channels, generator=generator) * 2 + torch.randn(channels, generator=generator) * 3
    weight, bias = torch.randn(2, channels, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": x.to(device, dtype), "count": torch.tensor([count], dtype=torch.int32, device=device),
        "weight": weight.to(device, wide), "bias": bias.to(device, wide), "eps": 1e-5,
    }  # fmt: skip


def _function(**arguments: Any) -> Tensor:
    return batch_norm(**arguments).y


def _oracle(arguments: Arguments) -> Tensor:
    count = int(arguments["count"])
    values, weight, bias = (arguments[name].double().cpu() for name in ("x", "weight", "bias"))
    y = torch.zeros_like(values)
    centred = values[:count] - values[:count].mean(dim=0)
    y[:count] = centred / (centred.square().mean(dim=0) + arguments["eps"]).sqrt() * weight + bias
    return y


def _cost(knobs: Mapping[str, Any]) -> Cost:
    return Cost(3 * 2 * knobs["count"] * knobs["channels"], 8 * knobs["count"] * knobs["channels"])


OPERATION = Operation(
    name="batch_norm",
    function=_function,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"rows": 300, "count": 130, "channels": 7},
        {"rows": 65, "count": 65, "channels": 40},
        {"rows": 400, "count": 385, "channels": 1},
    ),
    large={"rows": 100000, "count": 81000, "channels": 96},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "weight", "bias"),
    timed=batch_norm,
)
