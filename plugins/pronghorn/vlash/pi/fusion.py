"""One matrix product in place of three (queries, keys, values) or two (gate and up), and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
FUSED = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}


def fuse(layers: Iterable[Any]) -> None:
    """Join projections of layers in place: rows [q | k | v] to `qkv_proj`, [gate | up] to `gate_up_proj`.

    Layers that are fused already are left. Their own `forward`, where they have one, works again after `unfuse`.

    Args:
        layers: Gemma layers.

    Raises:
        TypeError: a projection is no plain linear layer, as inside of LoRA: merge it first.
    """
    for layer in layers:
        for owner, name, parts in _places(layer):
            if not hasattr(owner, name):
                setattr(owner, name, _joined([getattr(owner, part) for part in parts]))
                for part in parts:
                    delattr(owner, part)


def unfuse(layers: Iterable[Any]) -> None:
    """Split what `fuse` joined, in place."""
    for layer in layers:
        for owner, name, parts in _places(layer):
            if hasattr(owner, name):
                linear = getattr(owner, name)
                rows = _rows(name, linear.out_features, layer.self_attn.o_proj.in_features)
                for part, split in zip(parts, _split(linear, rows), strict=True):
                    setattr(owner, part, split)
                delattr(owner, name)


def fuse_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights under fused names.

    Args:
        state: names to weights; other weights are left.

    Raises:
        ValueError: of three, or two, projections some are missing.
    """
    fused = dict(state)
    for name, parts in FUSED.items():
        for key in [key for key in state if f".{parts[0]}." in key and _is_gemma(key)]:
            keys = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            missing = [other for other in keys if other not in state]
            if missing:
                raise ValueError(f"state: got {key} without {', '.join(missing)}")
            fused[key.replace(f".{parts[0]}.", f".{name}.")] = torch.cat([fused.pop(other) for other in keys])
    return fused


def unfuse_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights under the names of its base; what is not fused is left.

    Raises:
        ValueError: the weight of `o_proj`, which tells how many rows are queries, is missing.
    """
    split = dict(state)
    for name, parts in FUSED.items():
        for key in [key for key in state if f".{name}." in key]:
            weight = split.pop(key)
            queries = 0
            if parts is QKV:
                output = key.rpartition(f".{name}.")[0] + ".o_proj.weight"
                if output not in state:
                    raise ValueError(f"state: got {key} without {output}, which tells how many rows are queries")
                queries = state[output].shape[1]
            rows = _rows(name, len(weight), queries)
            for part, piece in zip(parts, weight.split(rows), strict=True):
                split[key.replace(f".{name}.", f".{part}.")] = piece.clone()
    return split


def _places(layer: Any) -> list[tuple[Any, str, tuple[str, ...]]]:
    return [(layer.self_attn, "qkv_proj", QKV), (layer.mlp, "gate_up_proj", GATE_UP)]


def _is_gemma(key: str) -> bool:
    """A vision tower has projections of these names too, and keeps them."""
    return "vision_tower" not in key


def _rows(name: str, total: int, queries: int) -> list[int]:
    if FUSED[name] is QKV:
        return [queries, (total - queries) // 2, (total - queries) // 2]
    return [total // 2, total // 2]


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise TypeError(f"layers: got a projection of {type(linear).__name__}, wanted torch.nn.Linear; merge first")
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    return _linear(weight, bias, linears[0].weight.requires_grad)


def _split(linear: nn.Linear, rows: list[int]) -> list[nn.Linear]:
    weights = linear.weight.detach().split(rows)
    biases = [None] * len(rows) if linear.bias is None else linear.bias.detach().split(rows)
    trained = linear.weight.requires_grad
    return [
        _linear(weight.clone(), None if bias is None else bias.clone(), trained)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trained)
    return linear
