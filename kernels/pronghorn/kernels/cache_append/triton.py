"""Triton kernel that writes a token to two caches: one launch, a program for each sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.kv_quantize.reference import SMALLEST_SCALE


@triton.jit
def _coded(even, odd, inside, smallest, LEVELS: tl.constexpr):
    """Codes of both halves of a head's channels, its scale and its zero."""
    low = tl.min(tl.where(inside, tl.minimum(even, odd), float("inf")), axis=0)
    high = tl.max(tl.where(inside, tl.maximum(even, odd), float("-inf")), axis=0)
    scale = tl.div_rn(high - low, LEVELS + 0.0) + smallest
    wide = tl.broadcast_to(scale, even.shape)
    even = tl.minimum(tl.maximum(tl.floor(tl.div_rn(even - low, wide) + 0.5), 0.0), LEVELS).to(tl.int32)
    odd = tl.minimum(tl.maximum(tl.floor(tl.div_rn(odd - low, wide) + 0.5), 0.0), LEVELS).to(tl.int32)
    return even, odd, scale, low


@triton.jit
def _write(source, target, scales, zeros, place, scale_place, smallest,
           SIZE: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    pair = tl.arange(0, HALF)
    inside = 2 * pair < SIZE
    even = tl.load(source + 2 * pair, mask=inside, other=0.0)
    odd = tl.load(source + 2 * pair + 1, mask=2 * pair + 1 < SIZE, other=0.0)
    if BITS == 16:
        tl.store(target + place + 2 * pair, even, mask=inside)
        tl.store(target + place + 2 * pair + 1, odd, mask=2 * pair + 1 < SIZE)
    else:
        levels: tl.constexpr = 2**BITS - 1
        even, odd, scale, zero = _coded(even.to(tl.float32), odd.to(tl.float32), inside, smallest, levels)
        if BITS == 4:
            tl.store(target + place + pair, (even * 16 + odd).to(tl.uint8), mask=inside)
        else:
            tl.store(target + place + 2 * pair, even.to(tl.uint8), mask=inside)
            tl.store(target + place + 2 * pair + 1, odd.to(tl.uint8), mask=inside)
        tl.store(scales + scale_place, scale.to(tl.float16))
        tl.store(zeros + scale_place, zero.to(tl.float16))


@triton.jit
def _append(
    key, value, full_key, full_key_scale, full_key_zero, full_value, full_value_scale, full_value_zero,
    streaming_key, streaming_key_scale, streaming_key_zero, streaming_value, streaming_value_scale,
    streaming_value_zero, full_lengths, streaming_lengths, head_index, sink, recent, smallest, kinds,
    full_heads, full_capacity, streaming_heads, streaming_capacity,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    count, written = tl.load(full_lengths + b), tl.load(streaming_lengths + b)
    slot = tl.where(written < sink, written, sink + (written - sink) % recent)
    for h in range(kinds):
        index = tl.load(head_index + h)
        own = (b * kinds + h) * SIZE
        if index >= 0:
            if count < full_capacity:
                at = (b * full_heads + index) * full_capacity + count
                _write(key + own, full_key, full_key_scale, full_key_zero, at * WIDTH, at, smallest, SIZE, HALF, BITS)
                _write(
                    value + own, full_value, full_value_scale, full_value_zero, at * WIDTH, at, smallest,
                    SIZE, HALF, BITS,
                )  # fmt: skip
        else:
            if slot < streaming_capacity:
                at = (b * streaming_heads - 1 - index) * streaming_capacity + slot
                _write(
                    key + own, streaming_key, streaming_key_scale, streaming_key_zero, at * WIDTH, at, smallest,
                    SIZE, HALF, BITS,
                )  # fmt: skip
                _write(
                    value + own, streaming_value, streaming_value_scale, streaming_value_zero, at * WIDTH, at, smallest,
                    SIZE, HALF, BITS,
                )  # fmt: skip
    tl.store(full_lengths + b, count + 1)
    tl.store(streaming_lengths + b, written + 1)


def cache_append(
    key: Tensor,
    value: Tensor,
    full: list[Tensor],
    streaming: list[Tensor],
    full_lengths: Tensor,
    streaming_lengths: Tensor,
    head_index: Tensor,
    sink_size: int,
    recent_size: int,
    bits: int,
) -> None:
    """In place; caches must be contiguous."""
    for tensor in (*full, *streaming, full_lengths, streaming_lengths):
        if not tensor.is_contiguous():
            raise ValueError(f"full, streaming: got strides {tensor.stride()}, wanted contiguous caches and lengths")
    batch, kinds, _, size = key.shape
    tensors = [*_six(full), *_six(streaming)]
    _append[(batch,)](
        key.contiguous(), value.contiguous(), *tensors, full_lengths, streaming_lengths, head_index.contiguous(),
        sink_size, recent_size, SMALLEST_SCALE, kinds,
        full[0].shape[1], full[0].shape[2], streaming[0].shape[1], streaming[0].shape[2],
        size, full[0].shape[3], triton.next_power_of_2((size + 1) // 2), bits, num_warps=1,
    )  # fmt: skip


def _six(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if len(tensors) == 6 else [tensors[0]] * 3 + [tensors[1]] * 3
