"""What is checked and measured of `sparse_convolution`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.kernel_map import kernel_map
from pronghorn.kernels.kernel_map.cases import bounds_of, box_offsets, random_coords
from pronghorn.kernels.sparse_convolution import SortedMap, sort_map, sparse_convolution


def transposed(found: Tensor, inputs: int) -> Tensor:
    """The outputs of each input."""
    result: Tensor = found.new_full((len(found), inputs + 1), -1)
    rows = torch.where(found < 0, inputs, found).long()
    result.scatter_(1, rows, torch.arange(found.shape[1], device=found.device).int().expand_as(found))
    return result[:, :inputs].contiguous()


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    coords = random_coords(knobs["rows"], knobs["sizes"], generator)
    offsets, bounds = box_offsets(knobs["kernel_size"]), bounds_of(coords)
    sites = coords[:: knobs.get("every", 1)]
    found = kernel_map(coords, sites, offsets, stride=[1] * coords.shape[1], bounds=bounds).to(device)
    maps: list[Any] = [found, transposed(found, len(coords))]
    splits = knobs["splits"]
    if splits:
        maps = [sort_map(table, splits=splits) for table in maps]
    x = torch.randn(len(coords), knobs["channels"], generator=generator)
    weight = torch.randn(len(offsets), knobs["channels"], knobs["columns"], generator=generator)
    weight /= (len(offsets) * knobs["channels"]) ** 0.5
    return {
        "x": x.to(device, dtype), "weight": weight.to(device, dtype), "kernel_map": maps[0], "transposed_map": maps[1]
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    x, weight = arguments["x"].double().cpu(), arguments["weight"].double().cpu()
    given = arguments["kernel_map"]
    found: Tensor = given.kernel_map if isinstance(given, SortedMap) else given
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    out: Tensor = x.new_zeros(found.shape[1], weight.shape[2])
    for k, rows in enumerate(found.long().cpu()):
        to = given.order[k // given.active.shape[2]].long().cpu() if isinstance(given, SortedMap) else slice(None)
        out[to] += padded[rows] @ weight[k]
    return out


def _cost(knobs: Mapping[str, Any]) -> Cost:
    volume = torch.Size(knobs["kernel_size"]).numel()
    rows, channels, columns = knobs["rows"], knobs["channels"], knobs["columns"]
    weight = volume * channels * columns
    return Cost(2 * (rows * (channels + columns) + weight) + 4 * volume * rows, 2 * rows * weight)


OPERATION = Operation(
    name="sparse_convolution",
    function=sparse_convolution,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"rows": 20, "sizes": (2, 3, 3, 2), "kernel_size": (3, 3, 3), "channels": 2, "columns": 3, "splits": 0},
        {"rows": 20, "sizes": (2, 3, 3, 2), "kernel_size": (3, 3, 3), "channels": 3, "columns": 2, "splits": 1},
        {"rows": 30, "sizes": (1, 5, 3), "kernel_size": (3, 2), "channels": 4, "columns": 1, "splits": 2},
        {"rows": 20, "sizes": (1, 40), "kernel_size": (2,), "channels": 5, "columns": 3, "splits": 2, "every": 3},
        {"rows": 300, "sizes": (1, 9, 12, 7), "kernel_size": (3, 2, 3), "channels": 33, "columns": 20, "splits": 3},
        {"rows": 90, "sizes": (1, 9, 9, 9), "kernel_size": (5, 5, 5), "channels": 3, "columns": 4, "splits": 4},
        {"rows": 400, "sizes": (2, 9, 9, 4), "kernel_size": (3, 3, 3), "channels": 70, "columns": 40, "splits": 0},
    ),
    large={"rows": 40000, "sizes": (1, 160, 160, 20), "kernel_size": (3, 3, 3), "channels": 64, "columns": 64,
           "splits": 1},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "weight"),
)  # fmt: skip
