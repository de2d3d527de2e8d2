"""What is checked and measured of `group_fake_quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.group_fake_quantize import group_fake_quantize, reference


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    weight = torch.randn(knobs["n"], knobs["k"], generator=generator).to(dtype)
    weight[:1] = 0
    weight[-1:] = weight[-1:].abs()
    names = ("bits", "group_size", "symmetric")
    return {"weight": weight.to(device), **{name: knobs[name] for name in names}}


def _oracle(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    # The definition rounds every step in the weight's dtype: the reference on the CPU is the oracle, bit by bit.
    weight = arguments["weight"].cpu()
    size = weight.shape[1] if arguments["group_size"] == -1 else arguments["group_size"]
    return reference.group_fake_quantize(weight, arguments["bits"], size, arguments["symmetric"])


def _cost(knobs: Mapping[str, Any]) -> Cost:
    return Cost(4 * knobs["n"] * knobs["k"] * (1 + 1 / knobs["group_size"]), 8 * knobs["n"] * knobs["k"])


OPERATION = Operation(
    name="group_fake_quantize",
    function=group_fake_quantize,
    example=_example,
    oracle=_oracle,
    shapes=tuple(
        {"n": 5, "k": 96, "bits": bits, "group_size": size, "symmetric": symmetric}
        for bits in (2, 3, 4, 8)
        for size in (32, 48, -1)
        for symmetric in (False, True)
    ),
    large={"n": 14336, "k": 4096, "bits": 4, "group_size": 128, "symmetric": False},
    cost=_cost,
    tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
    rows={"weight": 0},
)
