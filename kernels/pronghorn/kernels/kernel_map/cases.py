"""What is checked and measured of `kernel_map`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.kernel_map import kernel_map


def random_coords(rows: int, sizes: tuple[int, ...], generator: torch.Generator, lower: int = 0) -> Tensor:
    """int32 [up to `rows`, dimensions], each once, in any order."""
    found = torch.stack([torch.randint(0, size, (rows,), generator=generator) for size in sizes], dim=1).unique(dim=0)
    result: Tensor = (found[torch.randperm(len(found), generator=generator)] + lower).int()
    return result


def box_offsets(kernel_size: tuple[int, ...]) -> Tensor:
    """int32 [kernel volume, 1 + dimensions] of a centred kernel; the batch index stays."""
    ranges = [torch.arange(size) - (size - 1) // 2 for size in kernel_size]
    offsets: Tensor = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *ranges)
    return offsets.int()


def bounds_of(coords: Tensor) -> Tensor:
    """int64 [2, dimensions]; of no rows, bounds that hold nothing."""
    if not len(coords):
        return torch.tensor([[0], [-1]]).repeat(1, coords.shape[1])
    return torch.stack(coords.aminmax(dim=0)).long()


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    coords = random_coords(knobs["rows"], knobs["sizes"], generator, knobs.get("lower", 0))
    stride = (1, *[knobs["stride"]] * (len(knobs["sizes"]) - 1))
    sites = coords.div(torch.tensor(stride), rounding_mode="floor").unique(dim=0).int() if max(stride) > 1 else coords
    return {
        "coords": coords.to(device), "out_coords": sites.to(device),
        "offsets": box_offsets(knobs["kernel_size"]).to(device), "stride": stride,
        "bounds": bounds_of(coords), "table": knobs["table"],
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    rows = {tuple(row): i for i, row in enumerate(arguments["coords"].tolist())}
    sites = arguments["out_coords"].cpu() * torch.tensor(arguments["stride"])
    found = [[rows.get(tuple(q), -1) for q in (sites + o).tolist()] for o in arguments["offsets"].cpu()]
    return torch.tensor(found).double()


def _cost(knobs: Mapping[str, Any]) -> Cost:
    volume = torch.Size(knobs["kernel_size"]).numel()
    return Cost(knobs["rows"] * (4 * len(knobs["sizes"]) + 12 + volume * (12 + 4)), 0)


OPERATION = Operation(
    name="kernel_map",
    function=kernel_map,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"rows": 150, "sizes": (2, 6, 7, 5), "kernel_size": (3, 3, 3), "stride": 1, "table": "grid"},
        {"rows": 150, "sizes": (2, 6, 7, 5), "kernel_size": (3, 3, 3), "stride": 1, "table": "hash"},
        {"rows": 300, "sizes": (1, 40), "kernel_size": (5,), "stride": 2, "table": "hash", "lower": -20},
        {"rows": 200, "sizes": (2, 4, 5, 3, 4), "kernel_size": (2, 3, 1, 3), "stride": 2, "table": "grid"},
        {"rows": 700, "sizes": (1, 1 << 20, 2), "kernel_size": (3, 2), "stride": 1, "table": "", "lower": -(1 << 20)},
    ),
    large={"rows": 40000, "sizes": (1, 160, 160, 20), "kernel_size": (3, 3, 3), "stride": 1, "table": "hash"},
    cost=_cost,
    tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
    atomics=("atomic_cas", "atomic_max"),  # of whole numbers: any order gives the same
)
