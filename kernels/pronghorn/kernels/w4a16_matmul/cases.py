"""What is checked and measured of `w4a16_matmul`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.dequantize_weight.cases import packed_bytes, random_packed
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS
from pronghorn.kernels.w4a16_matmul import reference, w4a16_matmul


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    x = torch.randn(knobs["m"], knobs["k"], generator=generator).to(dtype).to(device)
    return {"x": x, **random_packed(knobs, dtype, generator, device)}


def _oracle(arguments: Arguments) -> Tensor:
    exact = to_float64(arguments)
    if exact["group_size"] == -1:
        exact["group_size"] = exact["x"].shape[1]
    return reference.w4a16_matmul(**exact)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    m, n, k = knobs["m"], knobs["n"], knobs["k"]
    return Cost(packed_bytes(knobs) + 2 * m * (n + k), 2 * m * n * k)


OPERATION = Operation(
    name="w4a16_matmul",
    function=w4a16_matmul,
    example=_example,
    oracle=_oracle,
    shapes=(
        *(
            {"m": m, "n": 64, "k": 192, "layout": layout.name, "bits": bits, "group_size": 64}
            for layout in LAYOUTS.values()
            for bits in layout.bits
            for m in (1, 5)
        ),
        {"m": 130, "n": 64, "k": 192, "layout": "natural", "bits": 4, "group_size": 64},
    ),
    large={"m": 1, "n": 14336, "k": 4096, "layout": "natural", "bits": 4, "group_size": 128},
    cost=_cost,
    # Rounding to bfloat16 alone is an error of 1.7e-3. The result is rounded once, and from a few rows on the weight
    # tile too, before the tensor cores see it: sqrt(2) of that.
    tolerance={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3},
    trains=("x",),
)
