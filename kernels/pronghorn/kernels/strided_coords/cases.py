"""What is checked and measured of `strided_coords`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.kernel_map.cases import bounds_of, box_offsets, random_coords
from pronghorn.kernels.strided_coords import strided_coords, strided_coords_within


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    coords = random_coords(knobs["rows"], knobs["sizes"], generator, knobs.get("lower", 0))
    stride = (1, *knobs["stride"])
    lower, upper = bounds_of(coords)
    steps = torch.tensor(stride)
    bounds = torch.stack([lower.div(steps, rounding_mode="floor"), (upper + 1) // steps])
    bounds[:, 0] = torch.stack([lower[0], upper[0]])
    return {
        "coords": coords.to(device), "offsets": box_offsets(knobs["kernel_size"]).to(device), "stride": stride,
        "bounds": bounds.long(),
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    (low, high), stride = arguments["bounds"].tolist(), arguments["stride"]
    found = set()
    for row in arguments["coords"].tolist():
        for offset in arguments["offsets"].tolist():
            moved = [a - b for a, b in zip(row, offset, strict=True)]
            if any(m % s for m, s in zip(moved, stride, strict=True)):
                continue
            site = tuple(m // s for m, s in zip(moved, stride, strict=True))
            if all(a <= q <= b for a, q, b in zip(low, site, high, strict=True)):
                found.add(site)
    return torch.tensor(sorted(found)).double().reshape(len(found), len(stride))


def _within(coords: Tensor, **arguments: Any) -> Tensor:
    """What a CUDA graph can hold."""
    return strided_coords_within(coords, **arguments, capacity=len(coords))[0]


def _cost(knobs: Mapping[str, Any]) -> Cost:
    return Cost(2 * 4 * len(knobs["sizes"]) * knobs["rows"], 0)


OPERATION = Operation(
    name="strided_coords",
    function=strided_coords,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"rows": 150, "sizes": (2, 6, 7, 5), "kernel_size": (3, 3, 3), "stride": (2, 2, 2)},
        {"rows": 60, "sizes": (3, 9, 11), "kernel_size": (2, 3), "stride": (2, 1), "lower": -5},
        {"rows": 40, "sizes": (1, 1 << 20, 1 << 20, 1 << 20), "kernel_size": (3, 3, 2), "stride": (2, 2, 3)},
    ),
    large={"rows": 40000, "sizes": (1, 1000, 1000, 40), "kernel_size": (3, 3, 3), "stride": (2, 2, 2)},
    cost=_cost,
    timed=_within,
    tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
)
