"""What is checked and measured of `head_sparse_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation, to_float64
from pronghorn.kernels.head_sparse_attention import head_sparse_attention, reference
from pronghorn.kernels.head_sparse_attention.reference import STREAMING, Rule, window


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, heads, size = knobs["batch"], len(knobs["types"]), knobs["size"]

    def random(tokens: int, heads: int) -> Tensor:
        # As attention layers have it: heads and tokens exchanged.
        return torch.randn(batch, tokens, heads, size, generator=generator).to(device, dtype).transpose(1, 2)

    start = knobs.get("start")
    return {
        "query": random(knobs["tokens"], heads),
        "key": random(knobs["length"], knobs["groups"]),
        "value": random(knobs["length"], knobs["groups"]),
        "head_types": torch.tensor(knobs["types"], dtype=torch.int32, device=device),
        "sink_size": knobs["sink"],
        "recent_size": knobs["recent"],
        "block_size": knobs.get("block"),
        "start": None if start is None else torch.tensor(start, dtype=torch.int32, device=device),
        "softcap": knobs.get("softcap", 0.0),
    }


def _oracle(arguments: Arguments) -> Tensor:
    exact = to_float64(arguments)
    query, key, value, types, start = (exact[name] for name in ("query", "key", "value", "head_types", "start"))
    scale = query.shape[-1] ** -0.5
    rule = Rule(exact["sink_size"], exact["recent_size"], exact["block_size"] or 1, exact["softcap"], scale)
    return reference.head_sparse_attention(query, key, value, types, start, rule)[0]


def _cost(knobs: Mapping[str, Any]) -> Cost:
    heads, rows = len(knobs["types"]), knobs["batch"] * knobs["tokens"]
    inputs = 2 * knobs["groups"] * knobs["batch"] * knobs["length"] + 2 * heads * rows
    return Cost(2 * inputs * knobs["size"] + 4 * heads * rows, 4 * visible_pairs(knobs) * knobs["size"])


def visible_pairs(knobs: Mapping[str, Any]) -> int:
    """Pairs of a query and a key that it sees, over batch and heads; counted row by row, without a mask."""
    tokens, length, block = knobs["tokens"], knobs["length"], knobs.get("block") or 1
    sink, reach = window(tokens, length, knobs["sink"], knobs["recent"], block)
    query = torch.arange(tokens)
    begin = torch.tensor(knobs.get("start") or [0] * knobs["batch"])[:, None]
    end = query + length - tokens + 1
    gap = torch.minimum(query // block * block + reach, end) - torch.minimum(begin + sink, end)
    seen = (end - begin).clamp(min=0)
    streaming = knobs["types"].count(STREAMING)
    return int(len(knobs["types"]) * seen.sum() - streaming * torch.minimum(gap.clamp(min=0), seen).sum())


def _shape(types: tuple[int, ...], groups: int, tokens: int, length: int, size: int, **rest: Any) -> dict[str, Any]:
    return {"batch": 1, "types": types, "groups": groups, "tokens": tokens, "length": length, "size": size,
            "sink": 4, "recent": 8, **rest}  # fmt: skip


MIXED = (0, -1, -1, 0)

OPERATION = Operation(
    name="head_sparse_attention",
    function=head_sparse_attention,
    example=_example,
    oracle=_oracle,
    shapes=(
        # The first four are small: gradients are checked on them.
        _shape(MIXED, 2, 11, 11, 4, sink=2, recent=3),
        _shape((-1, 0), 1, 5, 9, 4, sink=1, recent=2, batch=2, start=(2, 9), softcap=1.5),
        _shape((-1, 0), 2, 20, 23, 2, sink=3, recent=5, block=4),
        _shape((-1, -1, 0), 1, 7, 7, 3, sink=0, recent=1, softcap=2.0),
        _shape(MIXED, 2, 150, 150, 80, batch=2, start=(0, 70), sink=20, recent=30),
        _shape((-1,), 1, 1, 300, 64, sink=130, recent=40),
        _shape((-1, 0), 1, 129, 390, 16, sink=0, recent=33),
        _shape(MIXED, 4, 100, 230, 64, sink=40, recent=20, block=16),
        _shape(MIXED, 1, 257, 257, 64, sink=128, recent=256, block=128, softcap=30.0),
        _shape((0, -1), 1, 130, 130, 128, sink=3, recent=1),
    ),
    large=_shape((0,) * 16 + (-1,) * 16, 8, 16384, 16384, 128, sink=128, recent=256),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=("query", "key", "value"),
    rows={"query": 0, "key": 0, "value": 0, "start": 0},
)
