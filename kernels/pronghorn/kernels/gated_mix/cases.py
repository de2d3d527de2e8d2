"""What is checked and measured of `gated_mix`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.gated_mix import gated_mix, reference


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, gates, group, tokens, size = (knobs[name] for name in ("batch", "gates", "group", "tokens", "size"))
    full, streaming = torch.randn(2, batch, tokens, gates * group, size, generator=generator).to(device, dtype)
    gate = torch.linspace(-0.2, 1.2, gates) if gates > 1 else torch.tensor([0.3])
    return {
        "full": full.transpose(1, 2), "streaming": streaming.transpose(1, 2).contiguous(),
        "gate": gate.to(device, torch.float64 if dtype == torch.float64 else torch.float32),
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    return reference.gated_mix(**to_float64(arguments))


def _cost(knobs: Mapping[str, Any]) -> Cost:
    count = knobs["batch"] * knobs["gates"] * knobs["group"] * knobs["tokens"] * knobs["size"]
    return Cost(3 * 2 * count, 3 * count)


OPERATION = Operation(
    name="gated_mix",
    function=gated_mix,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"batch": 1, "gates": 4, "group": 2, "tokens": 5, "size": 8},
        {"batch": 2, "gates": 1, "group": 3, "tokens": 7, "size": 16},
        {"batch": 1, "gates": 2, "group": 1, "tokens": 70, "size": 80},
    ),
    large={"batch": 1, "gates": 8, "group": 4, "tokens": 32768, "size": 128},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("full", "streaming", "gate"),
    rows={"full": 0, "streaming": 0},
)
