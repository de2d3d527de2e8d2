"""What several Triton kernels need."""

from __future__ import annotations

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


def dot_width(size: int) -> int:
    """Width of a tile of `size` columns that `tl.dot` sums over: a power of two, and what tensor cores take at least.

    The interpreter would take less.
    """
    width: int = max(16, triton.next_power_of_2(size))
    return width
