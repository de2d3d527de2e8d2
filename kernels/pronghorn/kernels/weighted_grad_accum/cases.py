"""What is checked and measured of `weighted_grad_accum`: both buffers afterwards, and the norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.weighted_grad_accum import weighted_grad_accum


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    wide = torch.promote_types(dtype, torch.float32)
    shapes = knobs["shapes"] * knobs.get("repeats", 1)
    gradients = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    accum, score = ([torch.randn(shape, generator=generator).to(device, wide) for shape in shapes] for _ in range(2))
    return {
        "gradients": gradients, "accum": accum, "score": score if knobs["scored"] else None,
        "weights": torch.tensor([-0.37, 1.9], dtype=wide, device=device),
    }  # fmt: skip


def _added(
    gradients: list[Tensor], accum: list[Tensor], score: list[Tensor] | None, weights: Tensor
) -> tuple[Tensor, ...]:
    """The norm and copies of the buffers after the call."""
    accum = [buffer.detach().clone() for buffer in accum]
    score = None if score is None else [buffer.detach().clone() for buffer in score]
    squares = weighted_grad_accum(gradients, accum, score, weights)
    return squares, *accum, *(score or ())


def _oracle(arguments: Arguments) -> tuple[Tensor, ...]:
    """Tensor by tensor."""
    gradients = [gradient.double().cpu() for gradient in arguments["gradients"]]
    found = [torch.stack([gradient.square().sum() for gradient in gradients]).sum()]
    for name, weight in zip(("accum", "score"), arguments["weights"].tolist(), strict=True):
        for buffer, gradient in zip(arguments[name] or (), gradients, strict=False):
            found.append(buffer.double().cpu() + weight * gradient)
    return tuple(found)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    elements = knobs.get("repeats", 1) * sum(torch.Size(shape).numel() for shape in knobs["shapes"])
    buffers = 2 if knobs["scored"] else 1
    return Cost((2 + 8 * buffers) * elements, (2 + 2 * buffers) * elements)


OPERATION = Operation(
    name="weighted_grad_accum",
    function=_added,
    timed=weighted_grad_accum,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"shapes": [(3, 5), (7,), ()], "scored": True},
        {"shapes": [(70, 30), (2048,), (0, 4), (1,), (4100,)], "scored": True},
        {"shapes": [(64, 64), (33,)], "scored": False},
    ),
    large={"shapes": [(1536, 1536), (1536,), (8960, 1536), (256, 1536)], "repeats": 4, "scored": True},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6},
)
