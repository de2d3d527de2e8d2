"""What CUDA kernels for Hopper share on the host's side: where they can run, and the text of `wgmma`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ARCHITECTURE, CAPABILITY = "sm_90a", (9, 0)
ALIGNMENT = 16  # bytes, of what the copy engine reads, or a lane at once


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it has `wgmma` and the copy engine."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == CAPABILITY


def index_of(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and where the copy engine can begin; views need not be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def wgmma_header(name: str, columns: int, *, registers: bool = False, bfloat: bool = True) -> str:
    """A function that adds 64 x 16 by 16 x `columns` to sums: it has to name each of them.

    Args:
        name: of the function.
        columns: of the second operand.
        registers: the first operand is in registers, and of the second, rows are summed over, as they lie; else both
            are in shared memory, and columns are.
        bfloat: operands are bfloat16, else float16.
    """
    kind, count = "bf16" if bfloat else "f16", columns // 2
    sums = ", ".join(f"%{index}" for index in range(count))
    bound = ", ".join(f'"+f"(sum[{index}])' for index in range(count))
    operation = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    if registers:
        first = "{" + ", ".join(f"%{count + index}" for index in range(4)) + "}"
        declared, given = "const u32 *a", ", ".join(f'"r"(a[{index}])' for index in range(4))
        second, flags = count + 4, "1, 1, 1, 1"
    else:
        first, declared, given = f"%{count}", "u64 a", '"l"(a)'
        second, flags = count + 1, "1, 1, 1, 0, 0"
    return (
        f"__device__ inline void {name}(float *sum, {declared}, u64 b) {{\n"
        f'asm volatile("{operation} {{{sums}}}, {first}, %{second}, {flags};"\n'
        f': {bound} : {given}, "l"(b));\n}}\n'
    )
