"""What is checked and measured of `kv_quantize`: that the codes stand for what was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.kv_quantize import kv_quantize, reference


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    x = torch.randn(*knobs["shape"], generator=generator).to(device, dtype)
    return {"x": x, "bits": knobs["bits"], "group_size": knobs["group_size"]}


def _around(x: Tensor, bits: int, group_size: int) -> Tensor:
    return reference.kv_dequantize(*kv_quantize(x, bits=bits, group_size=group_size), bits, torch.float64)


def _oracle(arguments: Arguments) -> Tensor:
    """In float32, which belongs to the definition: a value between two codes must fall on the same side."""
    x = to_float64(arguments)["x"].float()
    codes = reference.kv_quantize(x, arguments["bits"], arguments["group_size"])
    return reference.kv_dequantize(*codes, arguments["bits"], torch.float64)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    *rows, size = knobs["shape"]
    count = torch.Size(rows).numel()
    return Cost(count * size * (2 + knobs["bits"] / 8) + count * size / knobs["group_size"] * 4, 4.0 * count * size)


OPERATION = Operation(
    name="kv_quantize",
    function=_around,
    timed=kv_quantize,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"shape": (2, 3, 5, 128), "bits": 4, "group_size": 128},
        {"shape": (1, 2, 7, 64), "bits": 8, "group_size": 64},
        {"shape": (3, 96), "bits": 4, "group_size": 32},
        {"shape": (2, 1, 80), "bits": 4, "group_size": 80},
        {"shape": (2, 1, 80), "bits": 8, "group_size": 20},
    ),
    large={"shape": (1, 8, 65536, 128), "bits": 4, "group_size": 128},
    cost=_cost,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
    rows={"x": 0},
)
