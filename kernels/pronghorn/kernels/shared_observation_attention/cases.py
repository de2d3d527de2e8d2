"""What is checked and measured of `shared_observation_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.shared_observation_attention import shared_observation_attention
from pronghorn.kernels.shared_observation_attention.reference import Tensors


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Random numbers; `absent` is the share of the prefix that is masked out, in a hole and at the end."""
    batch, length, groups, size = knobs["batch"], knobs["length"], knobs["groups"], knobs["size"]
    heads = groups * knobs["group"]
    prefix, branch = (batch, length), (batch, knobs["branches"], knobs["tokens"])
    shapes = [(*rows, count) for rows in (prefix, branch) for count in (heads, groups, groups)]
    drawn = [torch.randn(*shape, size, generator=generator).to(device, dtype) for shape in shapes]
    prefix_mask = torch.ones(prefix, dtype=torch.bool)
    absent = int(knobs.get("absent", 0) * length)
    prefix_mask[-1:, length // 4 : length // 4 + absent // 2] = False
    prefix_mask[:, length - absent + absent // 2 :] = False
    branch_mask = torch.ones(branch[:2], dtype=torch.bool)
    for which in knobs.get("invalid", ()):
        branch_mask[which] = False
    return {
        **dict(zip(Tensors._fields, drawn, strict=True)), "prefix_mask": prefix_mask.to(device),
        "branch_mask": branch_mask.to(device), "state_tokens": knobs.get("state", 0), "scale": knobs.get("scale"),
    }  # fmt: skip


def _oracle(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Sample by sample and branch by branch, of tokens that count alone."""
    prefix_query, prefix_key, prefix_value, *branches = (arguments[name].double().cpu() for name in Tensors._fields)
    prefix_out, branch_out = torch.zeros_like(prefix_query), torch.zeros_like(branches[0])
    masks, state = (arguments["prefix_mask"].cpu(), arguments["branch_mask"].cpu()), arguments["state_tokens"]
    scale = arguments["scale"]
    for b, real in enumerate(masks[0]):
        shared = prefix_key[b, real], prefix_value[b, real]
        prefix_out[b, real] = _attention(prefix_query[b, real], *shared, scale)
        for n in masks[1][b].nonzero()[:, 0].tolist():
            query, key, value = (tensor[b, n] for tensor in branches)
            for of, seen in ((slice(state), slice(state)), (slice(state, None), slice(None))):
                keys, values = torch.cat([shared[0], key[seen]]), torch.cat([shared[1], value[seen]])
                branch_out[b, n, of] = _attention(query[of], keys, values, scale)
    return prefix_out, branch_out


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    if not query.shape[0]:
        return query
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _cost(knobs: Mapping[str, Any]) -> Cost:
    heads, size = knobs["groups"] * knobs["group"], knobs["size"]
    rows = knobs["length"] + knobs["branches"] * knobs["tokens"]
    numbers = knobs["batch"] * rows * 2 * (heads + knobs["groups"]) * size
    return Cost(2 * numbers, 4 * heads * size * pairs(knobs))


def pairs(knobs: Mapping[str, Any]) -> int:
    """Pairs of a query and a key that it sees, where nothing is masked out, of one head."""
    length, tokens, state = knobs["length"], knobs["tokens"], knobs.get("state", 0)
    own = tokens * tokens - state * (tokens - state)
    return int(knobs["batch"] * (length * length + knobs["branches"] * (tokens * length + own)))


def _shape(
    batch: int, length: int, branches: int, tokens: int, groups: int, group: int, size: int, **more: Any
) -> dict[str, Any]:
    return {"batch": batch, "length": length, "branches": branches, "tokens": tokens, "groups": groups,
            "group": group, "size": size, **more}  # fmt: skip


OPERATION = Operation(
    name="shared_observation_attention",
    function=shared_observation_attention,
    example=_example,
    oracle=_oracle,
    shapes=(
        # The first four are small: gradients are checked on them.
        _shape(2, 5, 2, 3, 1, 2, 4, absent=0.5, state=1),
        _shape(1, 4, 3, 2, 2, 1, 3, invalid=((0, 1),)),
        _shape(2, 3, 1, 2, 1, 1, 2, absent=1.0, state=2, scale=0.7),
        _shape(2, 4, 2, 2, 1, 2, 2, invalid=(0, (1, 0))),
        _shape(2, 40, 3, 17, 1, 4, 32, absent=0.4, state=1, invalid=((1, 2),)),
        _shape(1, 33, 3, 50, 2, 3, 20, absent=0.2),
        _shape(1, 70, 2, 21, 1, 2, 256, state=1),
    ),
    large=_shape(4, 712, 9, 50, 1, 8, 256, absent=0.0),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    trains=Tensors._fields,
    rows=dict.fromkeys(
        (
            "prefix_query",
            "prefix_key",
            "prefix_value",
            "branch_query",
            "branch_key",
            "branch_value",
            "prefix_mask",
            "branch_mask",
        ),
        0,
    ),
)
