"""What several Triton kernels need."""

from __future__ import annotations

import torch
import triton.language as tl

from pronghorn.kernels._dispatch import interpreting


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What operands of `tl.dot` are cast to for tensors of `dtype`: their own, but the interpreter multiplies in fp32.

    It multiplies 16-bit operands wrongly.
    """
    if interpreting() or dtype == torch.float32:
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16
