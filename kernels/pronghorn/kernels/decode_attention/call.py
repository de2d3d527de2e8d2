"""What attention of one new token is asked for with, once it is checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """Arguments of the operation. Of two things the first is the full heads', the second the streaming heads'.

    Attributes:
        query: [batch, heads, 1, head_dim].
        full: key and value, or codes, scales and zeros of both (`CachedHeads.tensors`).
        streaming: the same.
        lengths: of both kinds.
        start: of both kinds.
        block_table: of both kinds.
        windows: sink and recent slots of both kinds; -1 recent ones where all are seen.
        head_index: of the key/value heads.
        key: of a token that is in no cache.
        value: the same.
        scale: of scores.
        softcap: of scores, 0 for none.
        bits: of what is cached.
    """

    query: Tensor
    full: list[Tensor]
    streaming: list[Tensor]
    lengths: list[Tensor]
    start: list[Tensor | None]
    block_table: list[Tensor | None]
    windows: list[int]
    head_index: Tensor
    key: Tensor | None
    value: Tensor | None
    scale: float
    softcap: float
    bits: int
