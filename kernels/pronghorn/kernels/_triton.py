"""What several Triton kernels need."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from pronghorn.kernels._dispatch import interpreting


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What operands of `tl.dot` are cast to for tensors of `dtype`: their own, but the interpreter multiplies in fp32.

    It multiplies 16-bit operands wrongly.
    """
    if interpreting() or dtype == torch.float32:
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number; Triton's own takes as long as a launch."""
    return 1 << (number - 1).bit_length()


def blocks(number: int, size: int) -> int:
    """How many blocks of a size a number takes; likewise."""
    return -(-number // size)


def dot_width(size: int) -> int:
    """Width of a tile of `size` columns that `tl.dot` sums over: a power of two, and what tensor cores take at least.

    The interpreter would take less.
    """
    return max(16, power_of_2(size))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have: 227 KiB on Hopper, 163 on an A100, 99 on desktops' GPUs; on a CPU as on Hopper."""
    if device.type != "cuda":
        return 227 << 10
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@triton.jit
def activate(y: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:  # noqa: N803 - a constant
    """y in float32 after None, "relu" or "silu"."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    if ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    return y
