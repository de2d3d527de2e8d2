"""What is checked and measured of `bias_activation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.bias_activation import bias_activation


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    layout = torch.channels_last if knobs["channels_last"] else torch.contiguous_format
    shape = knobs["batch"], knobs["channels"], *knobs["space"]
    x, residual = (
        torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=layout) for _ in range(2)
    )
    bias = torch.randn(knobs["channels"], generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    return {"x": x, "bias": bias, "residual": residual, "activation": knobs["activation"]}


def _oracle(arguments: Arguments) -> Tensor:
    x, bias, residual = (arguments[name].double().cpu() for name in ("x", "bias", "residual"))
    activations = {None: torch.nn.Identity(), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}
    wanted: Tensor = activations[arguments["activation"]](x + bias.view(-1, 1, 1) + residual)
    return wanted


def _cost(knobs: Mapping[str, Any]) -> Cost:
    elements = knobs["batch"] * knobs["channels"] * torch.Size(knobs["space"]).numel()
    return Cost(3 * 2 * elements, 6 * elements)


OPERATION = Operation(
    name="bias_activation",
    function=bias_activation,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"batch": 2, "channels": 6, "space": (3, 4), "channels_last": False, "activation": "silu"},
        {"batch": 2, "channels": 5, "space": (5, 3), "channels_last": True, "activation": "silu"},
        {"batch": 3, "channels": 3, "space": (1, 2), "channels_last": True, "activation": None},
        {"batch": 1, "channels": 300, "space": (8, 10), "channels_last": False, "activation": "relu"},
        {"batch": 2, "channels": 520, "space": (5, 7), "channels_last": True, "activation": None},
        {"batch": 2, "channels": 1, "space": (40, 60), "channels_last": False, "activation": None},
    ),
    large={"batch": 4, "channels": 512, "space": (128, 128), "channels_last": True, "activation": "silu"},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "bias", "residual"),
    rows={"x": 0, "residual": 0},
)
