"""The CUDA kernel of `decode.cu` for Hopper: where it can run, and how it is launched.

Triton moves what it has unpacked through shared memory before the tensor cores see it, which takes longer than reading
codes of four bits does: its kernel is hardly faster with them than with 16 bits.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import ALIGNMENT, ARCHITECTURE, index_of, is_hopper
from pronghorn.kernels.decode_attention.call import Call
from pronghorn.kernels.decode_attention.launch import SHORTEST_STRETCH, prepare

SOURCE = Path(__file__).with_name("decode.cu")
SIZES = (64, 128)
MOST_QUERIES = 16  # query heads of a key/value head
SUB = 16  # slots of a fragment, of which pages hold whole ones
WARPS = 4
PROCESSORS = 132
LOG2_E = 1.4426950408889634


def blocks_of_processor(group: int) -> int:
    """Blocks that have enough registers on a multiprocessor: more than eight query heads take a second accumulator."""
    return 3 if group <= 8 else 2


def obstacle(call: Call) -> str:
    """Why the kernel cannot run, or nothing."""
    query = call.query
    if not is_hopper(query.device):
        return "the device is no Hopper GPU"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"queries are {query.dtype}"
    if query.shape[3] not in SIZES:
        return f"heads have {query.shape[3]} channels"
    if query.shape[1] > MOST_QUERIES * call.head_index.shape[0]:
        return f"more than {MOST_QUERIES} query heads share keys and values"
    for tensors, table in zip((call.full, call.streaming), call.block_table, strict=True):
        if table is not None and tensors[0].shape[2] % SUB:
            return f"pages of {tensors[0].shape[2]} slots do not divide into fragments of {SUB}"
        if any(tensor.data_ptr() % ALIGNMENT for tensor in _wide(tensors, call.bits)):
            return f"a cache does not begin at a multiple of {ALIGNMENT} bytes"
    return "" if _nvrtc.available() else "the package cuda-bindings is not installed"


def _wide(tensors: list[Tensor], bits: int) -> list[Tensor]:
    return tensors if bits == 16 else [tensors[0], tensors[3]]


def decode_attention(call: Call) -> Tensor:
    """[batch, heads, 1, head_dim]."""
    query = call.query
    size, group = query.shape[3], query.shape[1] // call.head_index.shape[0]
    blocks = blocks_of_processor(group)
    scale = call.scale if call.softcap else call.scale * LOG2_E
    unit = ALIGNMENT // call.full[0].element_size()
    launch = prepare(call._replace(scale=scale), blocks=blocks * PROCESSORS, unit=unit)
    macros = {
        "SIZE": size, "GROUP": group, "BITS": call.bits, "BFLOAT": int(query.dtype == torch.bfloat16),
        "PAGED": int(launch.paged), "STARTS": int(launch.started), "EXTRA": int(launch.extra),
        "CAPPED": int(call.softcap > 0), "ALONE": int(launch.splits == 1), "SHORTEST": SHORTEST_STRETCH,
        "WARPS": WARPS, "BLOCKS": blocks,
    }  # fmt: skip
    _kernel(tuple(macros.items()), index_of(query.device)).launch((*launch.grid, 1), 32 * WARPS, 0, launch.arguments)
    from pronghorn.kernels.decode_attention.triton import join

    join(launch)
    return launch.out


@functools.cache
def _kernel(macros: tuple[tuple[str, int], ...], device: int) -> _nvrtc.Kernel:
    return _nvrtc.Kernel(compile_cubin(dict(macros)), "attend", device)


def compile_cubin(macros: dict[str, int]) -> bytes:
    """Machine code for a variant; needs no GPU."""
    return _nvrtc.compile_cubin(SOURCE, ARCHITECTURE, macros)
