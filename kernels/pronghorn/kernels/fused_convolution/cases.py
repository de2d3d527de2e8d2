"""What is checked and measured of `fused_convolution`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.fused_convolution import fused_convolution


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, channels, results, space = (knobs[name] for name in ("batch", "channels", "results", "space"))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def of_images(*shape: int) -> Tensor:
        return random(*shape).contiguous(memory_format=torch.channels_last)

    arguments: Arguments = {
        "x": of_images(batch, channels, *space), "weight": of_images(results, channels, 3, 3) / (3 * channels**0.5),
        "bias": random(results), "residual": of_images(batch, results, *space), "activation": knobs["activation"],
    }  # fmt: skip
    if knobs["normed"]:
        arguments |= {"norm_weight": random(results), "norm_bias": random(results), "eps": 1e-2}
    return arguments


def _oracle(arguments: Arguments) -> Tensor:
    given = {name: value.double().cpu() for name, value in arguments.items() if isinstance(value, Tensor)}
    x, weight = given["x"], given["weight"]
    batch, channels, height, width = x.shape
    around = torch.nn.functional.unfold(x, 3, padding=1).view(batch, channels * 9, height * width)
    y = (weight.reshape(len(weight), -1) @ around + given["bias"].view(-1, 1)).view(batch, len(weight), height, width)
    if "norm_weight" in given:
        y = y / (y.square().mean(dim=1, keepdim=True) + arguments["eps"]).sqrt()
        y = y * given["norm_weight"].view(-1, 1, 1) + given["norm_bias"].view(-1, 1, 1)
    activations = {None: torch.nn.Identity(), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}
    wanted: Tensor = activations[arguments["activation"]](y + given["residual"])
    return wanted


def _cost(knobs: Mapping[str, Any]) -> Cost:
    pixels, channels, results = (
        knobs["batch"] * torch.Size(knobs["space"]).numel(), knobs["channels"], knobs["results"]
    )  # fmt: skip
    return Cost(
        2 * (pixels * (channels + 2 * results) + 9 * channels * results), 2 * 9 * pixels * channels * results
    )  # fmt: skip


OPERATION = Operation(
    name="fused_convolution",
    function=fused_convolution,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"batch": 2, "channels": 3, "results": 5, "space": (3, 4), "normed": True, "activation": None},
        {"batch": 1, "channels": 6, "results": 4, "space": (5, 1), "normed": True, "activation": "silu"},
        {"batch": 3, "channels": 64, "results": 256, "space": (9, 7), "normed": True, "activation": None},
        {"batch": 1, "channels": 128, "results": 512, "space": (17, 9), "normed": True, "activation": "relu"},
        {"batch": 2, "channels": 64, "results": 512, "space": (16, 8), "normed": False, "activation": "silu"},
    ),
    large={"batch": 4, "channels": 512, "results": 512, "space": (256, 256), "normed": True, "activation": None},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "weight", "bias", "residual", "norm_weight", "norm_bias"),
)
