"""The CUDA kernels of `fragments.cu` for Hopper: which of them runs, with which tiles.

Triton cannot say in which registers a loaded code ends up, so it moves unpacked weights through shared memory before
the tensor cores see them; that bounds its kernels at a third of the memory's bandwidth here. The "fragments" layout is
the tensor cores' own register layout, and these kernels load it without a detour.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pronghorn.kernels import _nvrtc

SOURCE = Path(__file__).with_name("fragments.cu")
ARCHITECTURE, CAPABILITY = "sm_90a", (9, 0)
LAYOUT = "fragments"
BITS = (2, 3, 4)
STREAM_ROWS = 16
SHARED_BYTES = 227 << 10
PROCESSORS = 132


@dataclass(frozen=True)
class Stream:
    """Tiles of the kernel for few rows: `tokens` columns, warps along N and K, units of the weight in flight, blocks
    along K, blocks that must fit a multiprocessor."""

    chunks: ClassVar[int] = 2
    tokens: int
    warps_n: int
    warps_k: int
    depth: int
    split: int
    blocks: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_n * self.warps_k

    @property
    def outputs(self) -> int:
        """Of a block."""
        return 16 * self.warps_n

    @property
    def macros(self) -> dict[str, int]:
        """What the source wants defined."""
        return {"STREAM": 1, "TOKENS": self.tokens, "WARPS_N": self.warps_n, "WARPS_K": self.warps_k,
                "DEPTH": self.depth, "SPLIT": self.split, "BLOCKS": self.blocks}  # fmt: skip

    def shared_bytes(self, rows: int, columns: int) -> int:
        """x of this block's share of the inputs; later its sums."""
        share = -(-columns // 128 // self.split) * 128
        sums = self.warps_k * self.tokens * (self.outputs + 4) * 4
        return max(rows * (share + 8) * 2, sums)


@dataclass(frozen=True)
class Tile:
    """Tiles of the wgmma kernel: `tokens` columns, warpgroups along N and 64-row tiles of each, chunks that are handled
    at once, units of x and of the weight in flight, blocks along K, blocks that must fit a multiprocessor."""

    tokens: int
    groups_n: int
    tiles: int
    chunks: int
    stages: int
    depth: int
    split: int
    blocks: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * self.groups_n

    @property
    def outputs(self) -> int:
        """Of a block."""
        return 64 * self.groups_n * self.tiles

    @property
    def macros(self) -> dict[str, int]:
        """What the source wants defined."""
        return {"TOKENS": self.tokens, "GROUPS_N": self.groups_n, "TILES": self.tiles, "STAGES": self.stages,
                "DEPTH": self.depth, "SPLIT": self.split, "BLOCKS": self.blocks}  # fmt: skip

    def shared_bytes(self, rows: int, columns: int) -> int:
        """Stages of x; later the sums."""
        return max(self.stages * self.chunks * self.tokens * 128, self.tokens * (self.outputs + 4) * 4)


def obstacle(x: Tensor, scales: Tensor, layout: str, bits: int, group_size: int) -> str:
    """Why these kernels cannot run, or nothing."""
    if layout != LAYOUT or bits not in BITS:
        return f"the layout is {layout!r} with {bits} bits"
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != CAPABILITY:
        return "the device is no Hopper GPU"
    if x.dtype not in (torch.float16, torch.bfloat16) or scales.dtype != x.dtype:
        return f"x is {x.dtype} and the scales are {scales.dtype}"
    if group_size % 64 and group_size != 32:
        return f"groups of {group_size} do not divide into chunks of 64"
    return "" if _nvrtc.available() else "the package cuda-bindings is not installed"


@functools.cache
def plan(rows: int, outputs: int, columns: int) -> Stream | Tile:
    """Tiles for x [rows, columns] and a weight [outputs, columns]; chosen by measurement on an H100."""
    if rows <= 8:
        warps_n, warps_k = (1, 16 if columns > 8192 else 8) if rows <= 2 else (2, 8)
        split = 1
        while Stream(8, warps_n, warps_k, 1, split, 1).shared_bytes(rows, columns) > SHARED_BYTES // 2:
            split *= 2
        return Stream(8, warps_n, warps_k, 1, split, 4 if warps_k * warps_n == 8 else 1)
    tokens = next((size for size in (16, 32, 64) if rows <= size), 128)
    blocks = -(-outputs // 128) * -(-rows // tokens)
    split = 1
    while split < 4 and blocks * split * 2 <= 1.1 * PROCESSORS * (2 if tokens <= 64 else 1):
        split *= 2
    if tokens < 128:
        return Tile(tokens, 2, 1, 2, 5, 2, split, 2)
    return Tile(tokens, 2, 2, 1, 5, 2, split, 1)


def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
    chosen: Stream | Tile | None = None,
) -> Tensor:
    """x [M, K], contiguous, times the transposed weight, [M, N]."""
    rows, columns = x.shape
    output = x.new_empty(rows, out_features)
    if not rows:
        return output
    chosen = chosen or plan(rows, out_features, columns)
    grouped = 0 if group_size == columns else group_size
    kernel = _kernel(chosen, bits, grouped, columns % 128 == 0, x.dtype == torch.bfloat16, x.device.index)
    grid = (-(-out_features // chosen.outputs) * chosen.split, 1, 1)
    if isinstance(chosen, Tile):
        grid = (grid[0], -(-rows // chosen.tokens), 1)
    arguments = (x, qweight, scales, qzeros, output, rows, out_features, columns)
    kernel.launch(grid, chosen.threads, chosen.shared_bytes(rows, columns), arguments)
    return output


@functools.cache
def _kernel(
    chosen: Stream | Tile, bits: int, group_size: int, paired: bool, bfloat: bool, device: int
) -> _nvrtc.Kernel:
    chunks = min(chosen.chunks, 2 if not group_size % 128 and paired else 1)
    macros = {**chosen.macros, "BITS": bits, "GROUP": group_size, "CHUNKS": chunks, "BFLOAT": int(bfloat)}
    header = ("wgmma.cuh", wgmma_header(chosen.tokens, bfloat))
    return _nvrtc.Kernel(_nvrtc.compile_cubin(SOURCE, ARCHITECTURE, macros, header), "multiply_fragments", device)


def wgmma_header(tokens: int, bfloat: bool) -> str:
    """The wgmma instruction for 64 outputs x `tokens` x 16 inputs; it names each of its accumulators."""
    count, kind = tokens // 2, "bf16" if bfloat else "f16"
    registers = ", ".join(f"%{index}" for index in range(count))
    sums = ", ".join(f'"+f"(sum[{index}])' for index in range(count))
    a = ", ".join(f"%{count + index}" for index in range(4))
    return (
        "__device__ inline void wgmma(float *sum, const u32 *a, u64 descriptor) {\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} '
        f'{{{registers}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"\n'
        f': {sums} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));\n}}\n'
    )
