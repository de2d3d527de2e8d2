"""What is checked and measured of `group_clip_search`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.group_clip_search import group_clip_search
from pronghorn.kernels.group_fake_quantize.reference import group_fake_quantize


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    weight = torch.randn(knobs["n"], knobs["k"], generator=generator).to(dtype)
    inputs = torch.randn(knobs["tokens"], knobs["k"], generator=generator).to(dtype)
    names = ("bits", "group_size", "symmetric")
    return {"weight": weight.to(device), "inputs": inputs.to(device), **{name: knobs[name] for name in names}}


def _oracle(arguments: Arguments) -> Tensor:
    """The output error each choice leaves, in float64, straight from the definition, at its smallest."""
    return error_left(arguments, None)


def error_left(arguments: Arguments, maxima: Tensor | None) -> Tensor:
    """Output error [N, groups] of given clip maxima, or of the best ones of the grid."""
    weight, inputs = arguments["weight"].cpu(), arguments["inputs"].cpu().double()
    size = weight.shape[1] if arguments["group_size"] == -1 else arguments["group_size"]
    grouped = weight.unflatten(1, (-1, size))
    largest = grouped.abs().amax(-1, keepdim=True)
    tried = [largest * (1 - i / 20) for i in range(10)] if maxima is None else [maxima.cpu()[..., None]]
    errors = []
    for limit in tried:
        clamped = grouped.clamp(-limit, limit).flatten(1)
        fake, _, _ = group_fake_quantize(clamped, arguments["bits"], size, arguments["symmetric"])
        change = (fake - weight).double().unflatten(1, (-1, size))
        outputs = torch.einsum("tgk,ngk->ngt", inputs.unflatten(1, (-1, size)), change)
        errors.append(outputs.pow(2).mean(-1))
    return torch.stack(errors).amin(0)


def _error_of(**arguments: Any) -> Tensor:
    """Ties make maxima differ between precisions; what counts is the error that is left."""
    return error_left(arguments, group_clip_search(**arguments))


def _cost(knobs: Mapping[str, Any]) -> Cost:
    n, k, size = knobs["n"], knobs["k"], knobs["group_size"]
    return Cost(2 * n * k + 4 * k * size + 2 * n * k / size, 2 * k * size * (knobs["tokens"] + 10 * n))


OPERATION = Operation(
    name="group_clip_search",
    function=_error_of,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"n": 20, "k": 96, "tokens": 40, "bits": 4, "group_size": 32, "symmetric": False},
        {"n": 20, "k": 96, "tokens": 40, "bits": 3, "group_size": 32, "symmetric": True},
        {"n": 20, "k": 96, "tokens": 60, "bits": 3, "group_size": 48, "symmetric": False},
        {"n": 20, "k": 96, "tokens": 7, "bits": 4, "group_size": -1, "symmetric": False},
    ),
    large={"n": 4096, "k": 4096, "tokens": 512, "bits": 4, "group_size": 128, "symmetric": False},
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5},
    timed=group_clip_search,
)
