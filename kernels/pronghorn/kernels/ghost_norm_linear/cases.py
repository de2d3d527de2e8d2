"""What is checked and measured of `ghost_norm_linear`: shapes for which either way is the cheaper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.ghost_norm_linear import ghost_norm_linear


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    rows = trajectories, positions = knobs["trajectories"], knobs["positions"]
    inputs, gradients = (
        (torch.randn(*rows, size, generator=generator) + 0.3).to(device, dtype) for size in (knobs["in"], knobs["out"])
    )
    lengths = None
    if knobs["limited"]:
        lengths = torch.randint(0, positions + 1, (trajectories,), generator=generator).to(device, torch.int32)
    return {"inputs": inputs, "output_gradients": gradients, "lengths": lengths}


def _oracle(arguments: Arguments) -> Tensor:
    """Trajectory by trajectory, of the gradient itself."""
    exact = to_float64(arguments)
    inputs, gradients = exact["inputs"], exact["output_gradients"]
    lengths = [inputs.shape[1]] * len(inputs) if exact["lengths"] is None else exact["lengths"].tolist()
    found = [float((x[:n].T @ y[:n]).square().sum()) for x, y, n in zip(inputs, gradients, lengths, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    positions, size, features = knobs["positions"], knobs["in"] * knobs["out"], knobs["in"] + knobs["out"]
    flops = min(2 * positions * size, positions * (positions + 1) * features)
    return Cost(2 * knobs["trajectories"] * positions * features, knobs["trajectories"] * flops)


def _shape(trajectories: int, positions: int, features: tuple[int, int], limited: bool) -> dict[str, Any]:
    return {"trajectories": trajectories, "positions": positions, "in": features[0], "out": features[1],
            "limited": limited}  # fmt: skip


OPERATION = Operation(
    name="ghost_norm_linear",
    function=ghost_norm_linear,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape(3, 5, (6, 9), limited=False),
        _shape(2, 70, (40, 24), limited=True),
        _shape(3, 33, (70, 150), limited=True),
        _shape(1, 100, (130, 16), limited=False),
        _shape(2, 40, (256, 200), limited=False),
    ),
    large=_shape(16, 1024, (1536, 8960), limited=False),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5},
)
