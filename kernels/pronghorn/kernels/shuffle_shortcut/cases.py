"""What is checked and measured of `shuffle_shortcut`: both ways, and what a convolution gives on either grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.shuffle_shortcut import shuffle_add, unshuffle_add


def _either(main: Tensor, x: Tensor, bias: Tensor, *, up: bool, factor: int) -> Tensor:
    return (shuffle_add if up else unshuffle_add)(main, x, factor=factor, bias=bias)


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, factor, up, (height, width) = knobs["batch"], knobs["factor"], knobs["up"], knobs["coarse"]
    fine = height * factor, width * factor
    area, channels = factor**2, knobs["channels"]
    if knobs["shuffled"]:  # main is on the grid of x
        shape = (channels * area, height, width) if up else (channels // area, *fine)
    else:
        shape = (channels, *fine) if up else (channels, height, width)
    main = torch.randn(batch, *shape, generator=generator)
    x = torch.randn(batch, knobs["given"], *((height, width) if up else fine), generator=generator)
    layout = torch.channels_last if knobs["channels_last"] else torch.contiguous_format
    main, x = (tensor.to(device, dtype).contiguous(memory_format=layout) for tensor in (main, x))
    bias = torch.randn(main.shape[1], generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    return {"main": main, "x": x, "bias": bias, "up": up, "factor": factor}


def _oracle(arguments: Arguments) -> Tensor:
    """Place by place of a cell, with the channels that belong to it."""
    main, x, bias = (arguments[name].double().cpu() for name in ("main", "x", "bias"))
    main = main + bias[:, None, None]
    f, up = arguments["factor"], arguments["up"]
    if not up:
        x, main = _cells(x, f), main if main.shape[2] * f == x.shape[2] else _cells(main, f)
        wanted: Tensor = main + torch.stack([part.mean(dim=1) for part in x.chunk(main.shape[1], dim=1)], dim=1)
        return wanted
    if main.shape[2] != x.shape[2]:
        main = _cells(main, f)
    sums = main + torch.stack([x[:, n * x.shape[1] // main.shape[1]] for n in range(main.shape[1])], dim=1)
    batch, channels, height, width = sums.shape
    out: Tensor = sums.new_empty(batch, channels // f**2, height * f, width * f)
    for place in range(f**2):
        out[:, :, place // f :: f, place % f :: f] = sums[:, place :: f**2]
    return out


def _cells(fine: Tensor, factor: int) -> Tensor:
    """[batch, channels * factor^2, height / factor, width / factor]."""
    places = [fine[:, :, i::factor, j::factor] for i in range(factor) for j in range(factor)]
    return torch.stack(places, dim=2).flatten(1, 2)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    area = knobs["factor"] ** 2
    cells = knobs["batch"] * torch.Size(knobs["coarse"]).numel()
    out, x = (area, 1) if knobs["up"] else (1, area)
    elements = cells * (2 * knobs["channels"] * out + knobs["given"] * x)
    return Cost(2 * elements, elements)


OPERATION = Operation(
    name="shuffle_shortcut",
    function=_either,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"up": False, "batch": 2, "given": 2, "channels": 4, "coarse": (2, 3), "factor": 2, "shuffled": True,
         "channels_last": False},
        {"up": True, "batch": 1, "given": 4, "channels": 2, "coarse": (3, 2), "factor": 2, "shuffled": True,
         "channels_last": True},
        {"up": False, "batch": 1, "given": 3, "channels": 4, "coarse": (2, 2), "factor": 2, "shuffled": False,
         "channels_last": True},
        {"up": True, "batch": 2, "given": 3, "channels": 3, "coarse": (1, 2), "factor": 2, "shuffled": False,
         "channels_last": False},
        {"up": False, "batch": 1, "given": 24, "channels": 8, "coarse": (5, 7), "factor": 1, "shuffled": True,
         "channels_last": True},
        {"up": True, "batch": 2, "given": 6, "channels": 30, "coarse": (5, 7), "factor": 1, "shuffled": True,
         "channels_last": False},
        {"up": False, "batch": 1, "given": 160, "channels": 320, "coarse": (5, 7), "factor": 2, "shuffled": True,
         "channels_last": True},
        {"up": True, "batch": 1, "given": 40, "channels": 20, "coarse": (5, 36), "factor": 2, "shuffled": True,
         "channels_last": False},
        {"up": True, "batch": 1, "given": 300, "channels": 300, "coarse": (5, 3), "factor": 2, "shuffled": False,
         "channels_last": True},
        {"up": False, "batch": 2, "given": 8, "channels": 18, "coarse": (3, 8), "factor": 3, "shuffled": True,
         "channels_last": True},
    ),
    large={"up": True, "batch": 1, "given": 256, "channels": 128, "coarse": (512, 512), "factor": 2, "shuffled": True,
           "channels_last": True},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("main", "x", "bias"),
    rows={"main": 0, "x": 0},
)  # fmt: skip
