"""Triton kernel for rotary position embeddings: a program turns some heads of one token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._memory import tokens_outside

HEADS = 8  # of a program


@triton.jit
def _turn(
    x, out, cos, sin, head, heads, HALF: tl.constexpr, WIDTH: tl.constexpr, head_stride, out_stride, HEADS: tl.constexpr
):
    d, h = tl.arange(0, WIDTH), head + tl.arange(0, HEADS)
    used = d < HALF
    inside = (h < heads)[:, None] & used[None, :]
    at, to = x + h[:, None] * head_stride + d[None, :], out + h[:, None] * out_stride + d[None, :]
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    cos_first, cos_second = tl.load(cos + d, mask=used, other=0.0), tl.load(cos + HALF + d, mask=used, other=0.0)
    sin_first, sin_second = tl.load(sin + d, mask=used, other=0.0), tl.load(sin + HALF + d, mask=used, other=0.0)
    low = first * cos_first.to(tl.float32)[None, :] - second * sin_first.to(tl.float32)[None, :]
    high = second * cos_second.to(tl.float32)[None, :] + first * sin_second.to(tl.float32)[None, :]
    tl.store(to, low.to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    query, key, query_out, key_out, cos, sin, tokens, heads, cached,
    query_batch, query_head, query_token, key_batch, key_head, key_token, cos_batch, cos_token, sin_batch, sin_token,
    SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, token = row // tokens, row % tokens
    cos += b * cos_batch + token * cos_token
    sin += b * sin_batch + token * sin_token
    of_query = tl.cdiv(heads, HEADS)
    if block < of_query:
        x = query + b * query_batch + token * query_token
        out = query_out + row * heads * SIZE
        _turn(x, out, cos, sin, block * HEADS, heads, HALF, WIDTH, query_head, SIZE, HEADS)
    else:
        x = key + b * key_batch + token * key_token
        out = key_out + row * cached * SIZE
        _turn(x, out, cos, sin, (block - of_query) * HEADS, cached, HALF, WIDTH, key_head, SIZE, HEADS)


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both, rotated."""
    query, key, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, cos, sin))
    batch, heads, tokens, size = query.shape
    cached = key.shape[1]
    cos_batch, sin_batch = (tensor.stride(0) if tensor.shape[0] > 1 else 0 for tensor in (cos, sin))
    query_out, key_out = tokens_outside(query), tokens_outside(key)
    _rotate[(batch * tokens, triton.cdiv(heads, HEADS) + triton.cdiv(cached, HEADS))](
        query, key, query_out, key_out, cos, sin, tokens, heads, cached,
        *query.stride()[:3], *key.stride()[:3],
        cos_batch, cos.stride(1), sin_batch, sin.stride(1),
        size, size // 2, triton.next_power_of_2(size // 2), HEADS, num_warps=4,
    )  # fmt: skip
    return query_out, key_out
