"""What is checked and measured of `gated_depthwise_conv`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.gated_depthwise_conv import gated_depthwise_conv


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    doubled = 2 * knobs["channels"]
    x = torch.randn(knobs["batch"], doubled, knobs["height"], knobs["width"], generator=generator).to(device, dtype)
    weight = torch.randn(doubled, 1, 3, 3, generator=generator) / 3
    bias = torch.randn(doubled, generator=generator)
    if knobs["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(dtype, torch.float32)
    return {"x": x, "weight": weight.to(device, wide), "bias": bias.to(device, wide) if knobs["biased"] else None}


def _oracle(arguments: Arguments) -> Tensor:
    """Tap by tap, with the border written out."""
    x, weight = (arguments[name].double().cpu() for name in ("x", "weight"))
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x * x.sigmoid(), (1, 1, 1, 1))
    sums = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            sums += padded[:, :, i : i + height, j : j + width] * weight[:, :, i, j, None]
    if arguments["bias"] is not None:
        sums += arguments["bias"].double().cpu()[:, None, None]
    value, gate = sums.chunk(2, dim=1)
    wanted: Tensor = value * gate * gate.sigmoid()
    return wanted


def _cost(knobs: Mapping[str, Any]) -> Cost:
    outputs = knobs["batch"] * knobs["channels"] * knobs["height"] * knobs["width"]
    return Cost(3 * 2 * outputs, 2 * 2 * 9 * outputs)


OPERATION = Operation(
    name="gated_depthwise_conv",
    function=gated_depthwise_conv,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"batch": 2, "channels": 3, "height": 3, "width": 4, "channels_last": False, "biased": True},
        {"batch": 1, "channels": 2, "height": 5, "width": 7, "channels_last": True, "biased": True},
        {"batch": 1, "channels": 4, "height": 1, "width": 1, "channels_last": False, "biased": True},
        {"batch": 1, "channels": 1, "height": 2, "width": 9, "channels_last": True, "biased": True},
        {"batch": 1, "channels": 66, "height": 6, "width": 18, "channels_last": True, "biased": True},
        {"batch": 1, "channels": 9, "height": 5, "width": 130, "channels_last": False, "biased": False},
    ),
    large={"batch": 4, "channels": 2048, "height": 128, "width": 128, "channels_last": True, "biased": True},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "weight", "bias"),
    rows={"x": 0},
)
