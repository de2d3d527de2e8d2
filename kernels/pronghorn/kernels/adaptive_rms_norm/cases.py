"""What is checked and measured of `adaptive_rms_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.adaptive_rms_norm import adaptive_rms_norm


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Modulations are parts of one tensor, as a layer brings them."""
    rows, tokens, channels = knobs["rows"], knobs["tokens"], knobs["channels"]
    x, update = (torch.randn(*rows, tokens, channels, generator=generator).to(device, dtype) for _ in range(2))
    scale, shift, gate = torch.randn(*rows, 3 * channels, generator=generator).to(device, dtype).chunk(3, dim=-1)
    added, gated = knobs.get("added", True), knobs.get("gated", True)
    return {
        "x": x * 3, "scale": scale, "shift": shift, "update": update if added else None,
        "gate": gate if gated and added else None,
    }  # fmt: skip


def _oracle(arguments: Arguments) -> tuple[Tensor, Tensor]:
    exact = to_float64(arguments)
    total, update, gate = exact["x"], exact["update"], exact["gate"]
    if update is not None:
        total = total + (update if gate is None else update * gate[..., None, :])
    normal = torch.nn.functional.rms_norm(total, total.shape[-1:], eps=1e-6)
    return normal * (1 + exact["scale"][..., None, :]) + exact["shift"][..., None, :], total


def _cost(knobs: Mapping[str, Any]) -> Cost:
    rows = torch.Size(knobs["rows"]).numel()
    elements = rows * knobs["tokens"] * knobs["channels"]
    modulations = rows * knobs["channels"] * (3 if knobs.get("gated", True) else 2)
    return Cost(2 * ((4 if knobs.get("added", True) else 2) * elements + modulations), 8 * elements)


OPERATION = Operation(
    name="adaptive_rms_norm",
    function=adaptive_rms_norm,
    example=_example,
    oracle=_oracle,
    shapes=(
        # The first four are small: gradients are checked on them.
        {"rows": (2,), "tokens": 3, "channels": 5},
        {"rows": (2, 2), "tokens": 1, "channels": 4},
        {"rows": (), "tokens": 2, "channels": 3},
        {"rows": (1,), "tokens": 4, "channels": 1},
        {"rows": (3, 5), "tokens": 51, "channels": 96},
        {"rows": (2,), "tokens": 50, "channels": 1024},
        {"rows": (4,), "tokens": 7, "channels": 300, "gated": False},
        {"rows": (1, 3), "tokens": 17, "channels": 64, "added": False},
    ),
    large={"rows": (4, 50), "tokens": 50, "channels": 1024},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("x", "scale", "shift", "update", "gate"),
    rows={"x": 0, "scale": 0, "shift": 0, "update": 0, "gate": 0},
)
