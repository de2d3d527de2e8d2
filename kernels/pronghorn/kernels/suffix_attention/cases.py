"""What is checked and measured of `suffix_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.suffix_attention import suffix_attention


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Random numbers; `absent` is the share of the prefix that is masked out, another part in every sequence."""
    batch, tokens, length, groups = knobs["batch"], knobs["tokens"], knobs["length"], knobs["groups"]

    def random(count: int, heads: int) -> Tensor:
        return torch.randn(batch, count, heads, knobs["size"], generator=generator).to(device, dtype)

    prefix_mask = torch.ones(batch, length, dtype=torch.bool)
    absent = int(knobs.get("absent", 0) * length)
    for b in range(batch):
        prefix_mask[b, b : b + absent] = False
    return {
        "query": random(tokens, groups * knobs["group"]), "prefix_key": random(length, groups),
        "prefix_value": random(length, groups), "key": random(tokens, groups), "value": random(tokens, groups),
        "prefix_mask": prefix_mask.to(device), "state_tokens": knobs.get("state", 0), "scale": knobs.get("scale"),
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    """Sequence by sequence, of keys that are seen alone."""
    names = ("query", "prefix_key", "prefix_value", "key", "value")
    tensors = [arguments[name].double().cpu() for name in names]
    out, state = torch.zeros_like(tensors[0]), arguments["state_tokens"]
    for b, real in enumerate(arguments["prefix_mask"].cpu()):
        query, prefix_key, prefix_value, key, value = (tensor[b] for tensor in tensors)
        for of, seen in ((slice(state), slice(state)), (slice(state, None), slice(None))):
            keys, values = torch.cat([prefix_key[real], key[seen]]), torch.cat([prefix_value[real], value[seen]])
            if query[of].shape[0]:
                q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query[of], keys, values))
                found = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, scale=arguments["scale"], enable_gqa=True
                )
                out[b, of] = found[0].transpose(0, 1)
    return out


def _cost(knobs: Mapping[str, Any]) -> Cost:
    heads, keys = knobs["groups"] * knobs["group"], knobs["length"] + knobs["tokens"]
    cached = 2 * keys * knobs["groups"]
    rows = heads * knobs["tokens"]
    numbers = knobs["batch"] * (cached + 2 * rows) * knobs["size"]
    return Cost(2 * numbers, 4 * knobs["batch"] * rows * keys * knobs["size"])


def _shape(batch: int, tokens: int, length: int, groups: int, group: int, size: int, **more: Any) -> dict[str, Any]:
    return {"batch": batch, "tokens": tokens, "length": length, "groups": groups, "group": group, "size": size,
            **more}  # fmt: skip


OPERATION = Operation(
    name="suffix_attention",
    function=suffix_attention,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape(1, 5, 40, 1, 8, 32, absent=0.3, state=1),
        _shape(2, 35, 70, 1, 2, 16),
        _shape(3, 3, 130, 2, 3, 20, absent=0.9, state=3),
        _shape(1, 17, 100, 1, 8, 256, absent=0.5, state=1),
        _shape(2, 17, 1, 2, 1, 64, absent=1.0, state=2, scale=0.3),
    ),
    large=_shape(1, 50, 712, 1, 8, 256),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
