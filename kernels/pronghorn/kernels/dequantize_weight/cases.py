"""What is checked and measured of `dequantize_weight`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.dequantize_weight import dequantize_weight, reference
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS, pack


def random_packed(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Random packed weight of `knobs` (n, k, layout, bits, group_size): the arguments that describe it."""
    n, k, layout, bits = (knobs[name] for name in ("n", "k", "layout", "bits"))
    groups = 1 if knobs["group_size"] == -1 else k // knobs["group_size"]
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=generator) + 0.1).to(dtype) / 2**bits
    zeros = torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    if layout == "marlin":
        zeros.fill_(2 ** (bits - 1))
    tensors = pack(codes, scales, zeros, layout=layout, bits=bits, group_size=knobs["group_size"])
    arguments = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {
        "qzeros": None,
        **arguments,
        "layout": layout,
        "bits": bits,
        "group_size": knobs["group_size"],
        "out_features": n,
    }


def packed_bytes(knobs: Mapping[str, Any]) -> float:
    """Bytes of a packed weight with 16-bit scales and codes for zero points."""
    groups = 1 if knobs["group_size"] == -1 else knobs["k"] // knobs["group_size"]
    return float(knobs["n"] * (knobs["k"] * knobs["bits"] / 8 + groups * (2 + knobs["bits"] / 8)))


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
