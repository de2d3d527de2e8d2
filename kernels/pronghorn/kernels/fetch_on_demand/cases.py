"""What is checked and measured of `fetch_on_demand`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.fetch_on_demand import fetch_on_demand


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    rows, outputs, volume, count = (knobs[name] for name in ("rows", "outputs", "volume", "pairs"))
    count = count if rows and outputs else 0
    offset = torch.randint(0, max(volume, 1), (count,), generator=generator).sort().values
    pairs = torch.stack([torch.randint(0, max(most, 1), (count,), generator=generator) for most in (rows, outputs)])
    weight = torch.randn(volume, knobs["channels"], knobs["columns"], generator=generator) / knobs["channels"] ** 0.5
    scale = torch.rand(count, generator=generator) + 0.5
    return {
        "x": torch.randn(rows, knobs["channels"], generator=generator).to(device, dtype),
        "weight": weight.to(device, dtype),
        "pairs": pairs.int().to(device),
        "starts": torch.searchsorted(offset, torch.arange(volume + 1)).to(device, knobs.get("starts", torch.int32)),
        "outputs": outputs,
        "scale": scale.to(device, torch.promote_types(dtype, torch.float32)) if knobs["scaled"] else None,
    }


def _oracle(arguments: Arguments) -> Tensor:
    x, weight = arguments["x"].double().cpu(), arguments["weight"].double().cpu()
    pairs, starts = arguments["pairs"].long().cpu(), arguments["starts"].long().cpu()
    scale = x.new_ones(pairs.shape[1]) if arguments["scale"] is None else arguments["scale"].double().cpu()
    offset = torch.repeat_interleave(starts.diff())
    out: Tensor = x.new_zeros(arguments["outputs"], weight.shape[2])
    for k in offset.unique():
        rows, to = pairs[:, offset == k]
        out.index_add_(0, to, scale[offset == k, None] * x[rows] @ weight[k])
    return out


def _cost(knobs: Mapping[str, Any]) -> Cost:
    channels, columns = knobs["channels"], knobs["columns"]
    once = knobs["rows"] * channels + knobs["outputs"] * columns + knobs["volume"] * channels * columns
    return Cost(2 * once + knobs["pairs"] * (12 if knobs["scaled"] else 8), 2 * knobs["pairs"] * channels * columns)


OPERATION = Operation(
    name="fetch_on_demand",
    function=fetch_on_demand,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"rows": 6, "outputs": 5, "volume": 3, "pairs": 12, "channels": 2, "columns": 3, "scaled": True},
        {"rows": 4, "outputs": 7, "volume": 9, "pairs": 6, "channels": 3, "columns": 2, "scaled": True,
         "starts": torch.int64},
        {"rows": 5, "outputs": 1, "volume": 1, "pairs": 20, "channels": 1, "columns": 4, "scaled": True},
        {"rows": 3, "outputs": 9, "volume": 4, "pairs": 15, "channels": 4, "columns": 1, "scaled": True},
        {"rows": 300, "outputs": 200, "volume": 7, "pairs": 1500, "channels": 33, "columns": 20, "scaled": False},
        {"rows": 90, "outputs": 90, "volume": 40, "pairs": 500, "channels": 70, "columns": 40, "scaled": True,
         "starts": torch.int64},
        {"rows": 40, "outputs": 60, "volume": 5, "pairs": 200, "channels": 5, "columns": 130, "scaled": False},
    ),
    large={"rows": 100000, "outputs": 100000, "volume": 27, "pairs": 600000, "channels": 64, "columns": 64,
           "scaled": False},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "weight", "scale"),
    atomics=("atomic_add",),
    ordered=False,
)  # fmt: skip
