"""Tables on a device, by which one launch works on many tensors: their addresses, and numbers that go with them."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TABLES = 16  # that are kept
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}  # of what lies at an address


@triton.jit
def tensor_at(place: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:  # noqa: N803 - constants
    """The tensor whose address is at a place of a table; `ALIGNED` tells that it begins at a multiple of 16 bytes."""
    start = tl.load(place).to(tl.pointer_type(TYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


def device_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Int64 [numbers], in one copy that nothing waits for; none where the same table was asked for not long ago."""
    if device.type != "cuda":
        return _kept_table(numbers, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _recorded_table(numbers, device)
    return _kept_table(numbers, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(TABLES)
def _kept_table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Of one stream, for on another it might not be there yet."""
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def _recorded_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A graph's own: kept ones are freed before it, as is memory of the host. What a kernel is given stays with it."""
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), numbers)
    return table
