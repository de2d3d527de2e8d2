"""What is checked and measured of `geglu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.geglu import geglu


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Both are halves of one tensor, as fused projections bring them, or lie apart."""
    joined = 3 * torch.randn(*knobs["rows"], 2 * knobs["width"], generator=generator).to(device, dtype)
    gate, up = joined.chunk(2, dim=-1)
    return {"gate": gate.contiguous() if knobs.get("apart") else gate, "up": up}


def _oracle(arguments: Arguments) -> Tensor:
    exact = to_float64(arguments)
    gate = exact["gate"]
    result: Tensor = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * exact["up"]
    return result


def _cost(knobs: Mapping[str, Any]) -> Cost:
    elements = torch.Size(knobs["rows"]).numel() * knobs["width"]
    return Cost(2 * 3 * elements, 10 * elements)


OPERATION = Operation(
    name="geglu",
    function=geglu,
    example=_example,
    oracle=_oracle,
    shapes=(
        # The first four are small: gradients are checked on them.
        {"rows": (2, 3), "width": 5},
        {"rows": (), "width": 4},
        {"rows": (3,), "width": 1, "apart": True},
        {"rows": (2, 1, 2), "width": 3, "apart": True},
        {"rows": (7,), "width": 1030},
        {"rows": (1, 5), "width": 4096},
    ),
    large={"rows": (712,), "width": 16384},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("gate", "up"),
    rows={"gate": 0, "up": 0},
)
