"""What is checked and measured of `dequantize_weight`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, packed_bytes, random_packed, to_float64
from pronghorn.kernels.dequantize_weight import dequantize_weight, reference
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    return {**random_packed(knobs, dtype, generator, device), "in_features": knobs["k"]}


def _oracle(arguments: Arguments) -> Tensor:
    exact = to_float64(arguments)
    group_size = exact.pop("group_size")
    exact["group_size"] = exact["in_features"] if group_size == -1 else group_size
    return reference.dequantize_weight(**exact, dtype=torch.float64)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    return Cost(packed_bytes(knobs) + 2 * knobs["n"] * knobs["k"], 2 * knobs["n"] * knobs["k"])


OPERATION = Operation(
    name="dequantize_weight",
    function=dequantize_weight,
    example=_example,
    oracle=_oracle,
    shapes=tuple(
        {"n": 64, "k": 192, "layout": layout.name, "bits": bits, "group_size": 64}
        for layout in LAYOUTS.values()
        for bits in layout.bits
    ),
    large={"n": 14336, "k": 4096, "layout": "natural", "bits": 4, "group_size": 128},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3},
)
