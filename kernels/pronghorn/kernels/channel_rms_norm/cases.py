"""What is checked and measured of `channel_rms_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.channel_rms_norm import channel_rms_norm


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    channels = knobs["channels"]
    shape = knobs["batch"], channels, *knobs["space"]
    x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    x = x * 3
    if knobs["channels_last"]:
        x, residual = (values.movedim(1, -1).contiguous().movedim(-1, 1) for values in (x, residual))
    weight, bias = torch.randn(2, channels, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": x, "weight": weight.to(device, wide), "bias": bias.to(device, wide), "residual": residual,
        "activation": knobs["activation"],
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    x, weight, bias, residual = (arguments[name].double().cpu() for name in ("x", "weight", "bias", "residual"))
    y = torch.nn.functional.rms_norm(x.movedim(1, -1), x.shape[1:2], weight, 1e-5) + bias
    y = y.movedim(-1, 1) + residual
    activations = {None: torch.nn.Identity(), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}
    wanted: Tensor = activations[arguments["activation"]](y)
    return wanted


def _cost(knobs: Mapping[str, Any]) -> Cost:
    elements = knobs["batch"] * knobs["channels"] * torch.Size(knobs["space"]).numel()
    return Cost(3 * 2 * elements, 6 * elements)


OPERATION = Operation(
    name="channel_rms_norm",
    function=channel_rms_norm,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"batch": 2, "channels": 6, "space": (3, 4), "channels_last": False, "activation": "silu"},
        {"batch": 2, "channels": 5, "space": (5, 3), "channels_last": True, "activation": "silu"},
        {"batch": 1, "channels": 4, "space": (7,), "channels_last": False, "activation": None},
        {"batch": 3, "channels": 3, "space": (2,), "channels_last": True, "activation": None},
        {"batch": 1, "channels": 300, "space": (8, 10), "channels_last": False, "activation": "relu"},
        {"batch": 2, "channels": 520, "space": (5, 7), "channels_last": True, "activation": None},
        {"batch": 1, "channels": 2048, "space": (1, 3), "channels_last": True, "activation": "relu"},
        {"batch": 2, "channels": 128, "space": (1, 1), "channels_last": False, "activation": None},
    ),
    large={"batch": 4, "channels": 512, "space": (128, 128), "channels_last": True, "activation": None},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "weight", "bias", "residual"),
    rows={"x": 0, "residual": 0},
)
