"""What the layers of an action expert are asked for with, once it is checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SuffixLayer(NamedTuple):
    """A layer: its weights, what its norms take from their condition, and what it keeps of the prefix.

    Attributes:
        qkv: [(heads + 2) * head_dim, width], rows of queries, of the one key and of the one value.
        out: [width, heads * head_dim].
        gate_up: [2 * inner, width].
        down: [width, inner].
        scale: [width], of the norm before attention; and so on.
        shift: [width].
        gate: [width], of what attention adds.
        late_scale: [width], of the norm before the feed-forward; and so on.
        late_shift: [width].
        late_gate: [width], of what the feed-forward adds.
        key: [prefix tokens, head_dim], rotated.
        value: [prefix tokens, head_dim].
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    scale: Tensor
    shift: Tensor
    gate: Tensor
    late_scale: Tensor
    late_shift: Tensor
    late_gate: Tensor
    key: Tensor
    value: Tensor


def unflattened(tensors: list[Tensor]) -> list[SuffixLayer]:
    """Layers, of the tensors of one after the other."""
    count = len(SuffixLayer._fields)
    return [SuffixLayer(*tensors[at : at + count]) for at in range(0, len(tensors), count)]
