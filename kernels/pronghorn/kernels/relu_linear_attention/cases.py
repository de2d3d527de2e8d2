"""What is checked and measured of `relu_linear_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.relu_linear_attention import relu_linear_attention


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, heads, tokens, size = (knobs[name] for name in ("batch", "heads", "tokens", "size"))
    if knobs["channels_first"]:  # of an image: each head's q, k and v side by side
        qkv = torch.randn(batch, heads, 3 * size, tokens, generator=generator).to(device, dtype)
        q, k, v = qkv.mT.tensor_split(3, dim=3)
    else:
        qkv = torch.randn(batch, tokens, 3 * heads, size, generator=generator).to(device, dtype)
        q, k, v = qkv.transpose(1, 2).tensor_split(3, dim=1)
    return {"q": q, "k": k, "v": v}


def _oracle(arguments: Arguments) -> Tensor:
    """With the weights of all pairs of tokens written out, for a head at a time."""
    q, k, v = (arguments[name].double().cpu().flatten(0, 1) for name in ("q", "k", "v"))
    out = torch.empty_like(v)
    for head in range(len(q)):
        for first in range(0, q.shape[1], 1024):
            weights = q[head, first : first + 1024].relu() @ k[head].relu().T
            out[head, first : first + 1024] = weights @ v[head] / (weights.sum(dim=1, keepdim=True) + 1e-15)
    return out.view(arguments["q"].shape)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    tokens = knobs["batch"] * knobs["heads"] * knobs["tokens"]
    return Cost(4 * 2 * tokens * knobs["size"], 2 * 2 * tokens * knobs["size"] * (knobs["size"] + 1))


OPERATION = Operation(
    name="relu_linear_attention",
    function=relu_linear_attention,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"batch": 1, "heads": 2, "tokens": 7, "size": 16, "channels_first": True},
        {"batch": 2, "heads": 1, "tokens": 5, "size": 24, "channels_first": False},
        {"batch": 1, "heads": 2, "tokens": 1, "size": 32, "channels_first": True},
        {"batch": 1, "heads": 1, "tokens": 33, "size": 5, "channels_first": False},
        {"batch": 2, "heads": 3, "tokens": 320, "size": 32, "channels_first": True},
        {"batch": 1, "heads": 2, "tokens": 300, "size": 72, "channels_first": False},
        {"batch": 1, "heads": 1, "tokens": 131, "size": 128, "channels_first": True},
    ),
    large={"batch": 4, "heads": 16, "tokens": 16384, "size": 32, "channels_first": True},
    cost=_cost,
    tolerance={torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("q", "k", "v"),
)
