"""Permutes a model's attention heads so that retrieval heads come first in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def reorder_heads(model: Any, full_heads: Sequence[Sequence[bool]]) -> list[list[bool]]:
    """Permute queries', keys' and values' rows and the output projection's columns, in place; the function stays.

    Args:
        model: a causal language model of transformers with `q_proj`, `k_proj`, `v_proj` and `o_proj` linears.
        full_heads: [layers][key/value heads].

    Returns:
        `full_heads` in the new order: in each layer all that are full, then the others, each as they followed before.

    Raises:
        ValueError: a layer's attention is built differently; nothing is changed then.
    """
    from pronghorn.transformers.decoder import find_decoder_blocks

    layers = [(block.name, _projections(block.name, block.module)) for block in find_decoder_blocks(model)]
    for (_, linears), full in zip(layers, full_heads, strict=True):
        order = sorted(range(len(full)), key=lambda head: not full[head])
        for role, linear in linears.items():
            _permute(linear, role, order)
    return [sorted(full, reverse=True) for full in full_heads]


def _projections(name: str, block: nn.Module) -> dict[str, nn.Linear]:
    roles = ("q_proj", "k_proj", "v_proj", "o_proj")
    for path, module in block.named_modules():
        found: dict[str, Any] = {role: getattr(module, role, None) for role in roles}
        if all(linear is None for linear in found.values()):
            continue
        for role, linear in found.items():
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"{name}.{path}.{role}: got {type(linear).__name__}, only plain linears can be reordered; "
                    "take reorder=False, which gives the same result"
                )
        _check_no_more(f"{name}.{path}", module, found)
        return found
    raise ValueError(f"{name}: found no {', '.join(roles)}; take reorder=False, which gives the same result")


def _check_no_more(name: str, attention: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Whatever else belongs to single heads, such as a norm over all of them or sinks, would stay behind."""
    known = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    head_dim = getattr(attention, "head_dim", None)
    for path, parameter in attention.named_parameters():
        if id(parameter) not in known and parameter.numel() not in (1, head_dim):
            raise ValueError(f"{name}.{path}: belongs to the heads and cannot be reordered; take reorder=False")


@torch.no_grad()
def _permute(linear: nn.Linear, role: str, order: list[int]) -> None:
    """The blocks of key/value heads or of their groups: rows with their biases, or columns; an output's bias stays."""
    if role == "o_proj":
        linear.weight.copy_(_blocks(linear.weight.T, order).T)
        return
    for parameter in linear.parameters():
        parameter.copy_(_blocks(parameter, order))


def _blocks(tensor: Tensor, order: list[int]) -> Tensor:
    return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)
