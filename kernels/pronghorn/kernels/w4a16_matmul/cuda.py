"""The CUDA kernels of `fragments.cu` for Hopper: which of them runs, with which tiles.

Triton cannot say in which registers a loaded code ends up, so it moves unpacked weights through shared memory before
the tensor cores see them; that bounds its kernels at a third of the memory's bandwidth here. The "fragments" layout is
the tensor cores' own register layout, and these kernels load it without a detour.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import ARCHITECTURE, aligned, index_of, is_hopper

SOURCE = Path(__file__).with_name("fragments.cu")
LAYOUT = "fragments"
BITS = (2, 3, 4)
STREAM_COLUMNS = 1 << 16  # beyond it, x would take more shared memory than eight blocks have
SHARED_BYTES = 227 << 10
PROCESSORS = 132
MULTIPLICATIONS = 2048 * 1.75e3  # that a multiprocessor's tensor cores do in a microsecond
MOST_ROWS = 8192  # more rows take what these take
# Whatever the shape of the weight, the plans of other numbers of rows are among those of these.
PREPARED_ROWS = (1, 2, 4, 8, 16, 32, *range(64, MOST_ROWS + 1, 64))


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
    """Tiles of the wgmma kernel: `tokens` columns, warpgroups along N, chunks in a unit where scales allow it, units of
    x and of the weight in flight, blocks blocks along K, blocks that must fit a multiprocessor."""

    tokens: int
    groups_n: int
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
        return 64 * self.groups_n

    @property
    def macros(self) -> dict[str, int]:
        """What the source wants defined."""
        return {"TOKENS": self.tokens, "GROUPS_N": self.groups_n, "STAGES": self.stages,
                "DEPTH": self.depth, "SPLIT": self.split, "BLOCKS": self.blocks}  # fmt: skip

    def shared_bytes(self, rows: int, columns: int) -> int:
        """Stages of x and their barriers; later the sums."""
        sums = (self.outputs + 4) * 4 if self.split > 1 else (self.outputs + 8) * 2
        return max(self.stages * (self.chunks * self.tokens * 128 + 16), self.tokens * sums)


# For more than 64 rows. With each, fitted to what an H100 took for 96 to 1024 rows of Llama-3-8B's linears: how much
# longer than the tensor cores need, and the microseconds that a round of blocks takes besides.
LARGE_TILES = {
    Tile(256, 2, 1, 6, 4, 1, 1): (1.05, 3.5),
    Tile(256, 2, 1, 6, 4, 2, 1): (1.05, 8.5),
    Tile(192, 2, 1, 8, 4, 1, 1): (1.2, 2.5),
    Tile(192, 2, 1, 8, 4, 2, 1): (1.2, 6.5),
    Tile(128, 2, 1, 8, 4, 1, 1): (1.6, 1.6),
    Tile(128, 2, 1, 8, 4, 2, 1): (1.6, 4.6),
    Tile(128, 1, 1, 4, 4, 2, 3): (1.65, 4.0),
}


@functools.cache
def obstacle(device: torch.device, dtype: torch.dtype, scales: torch.dtype, bits: int, group_size: int) -> str:
    """Why these kernels cannot run on x of `dtype` and a weight whose scales have dtype `scales`, or nothing."""
    if not is_hopper(device):
        return "the device is no Hopper GPU"
    if dtype not in (torch.float16, torch.bfloat16) or scales != dtype:
        return f"x is {dtype} and the scales are {scales}"
    if bits not in BITS:
        return f"the weight has {bits} bits"
    if group_size % 64 and group_size != 32:
        return f"groups of {group_size} do not divide into chunks of 64"
    return "" if _nvrtc.available() else "the package cuda-bindings is not installed"


@functools.cache
def plan(rows: int, outputs: int, columns: int) -> Stream | Tile:
    """Tiles for x [rows, columns] and a weight [outputs, columns]; what was fastest for Llama-3-8B's linears."""
    if rows <= 2 and columns <= STREAM_COLUMNS:
        warps_k = 16 if columns > 8192 else 8
        return _fitting(Stream(8, 1, warps_k, 1, 1, 4 if warps_k == 8 else 1), rows, columns)
    if rows <= 8 and columns <= STREAM_COLUMNS:
        wide = outputs >= 8192 or (rows > 4 and columns > 8192)
        split = 2 if wide and outputs < 8192 else 1
        return _fitting(Stream(8, 4, 4, 1, split, 1) if wide else Stream(8, 2, 8, 1, split, 1), rows, columns)
    if rows <= 32 and outputs >= 16384:  # one round of larger blocks instead of nearly two
        return Tile(16 if rows <= 16 else 32, 2, 2, 4, 4, 1, 2)
    if rows <= 16:
        return Tile(16, 1, 2, 4, 4, _split(outputs // 64, 512), 2)
    if rows <= 32:
        return Tile(32, 1, 2, 4, 2, _split(outputs // 64, 512), 2)
    if rows <= 64:
        groups = 2 if outputs >= 8192 else 1
        return Tile(64, groups, 2, 4, 2, _split(outputs // (64 * groups), 2 * PROCESSORS), 2)
    return min(LARGE_TILES, key=lambda tile: _microseconds(tile, min(rows, MOST_ROWS), outputs, columns))


def _microseconds(tile: Tile, rows: int, outputs: int, columns: int) -> float:
    """About what a large tile takes: its blocks come in rounds, and the last one may be nearly empty."""
    slowdown, start = LARGE_TILES[tile]
    blocks = -(-rows // tile.tokens) * -(-outputs // tile.outputs) * tile.split
    of_one_processor = -(-blocks // PROCESSORS)
    rounds = -(-of_one_processor // tile.blocks)
    multiplications = of_one_processor * tile.tokens * tile.outputs * columns / tile.split
    return multiplications / MULTIPLICATIONS * slowdown + rounds * start


def _split(blocks: int, wanted: int) -> int:
    return next((split for split in (4, 2) if blocks * split <= wanted), 1)


def _fitting(stream: Stream, rows: int, columns: int) -> Stream:
    while stream.shared_bytes(rows, columns) > SHARED_BYTES:
        stream = replace(stream, split=stream.split * 2)
    return stream


def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """x [M, K] times the transposed weight, [M, N]."""
    rows, columns = x.shape
    output = x.new_empty(rows, out_features)
    if not output.numel():
        return output
    chosen = plan(rows, out_features, columns)
    kernel = _kernel(chosen, bits, group_size, columns, x.dtype, x.device)
    grid = (-(-out_features // chosen.outputs) * chosen.split, 1, 1)
    arguments: list[Any] = [aligned(tensor) for tensor in (x, qweight, scales, qzeros)]
    if isinstance(chosen, Tile):
        grid = (grid[0], -(-rows // chosen.tokens), 1)
        arguments[0] = _nvrtc.tensor_map(arguments[0], (min(chosen.tokens, rows), 64))
    arguments += [output, rows, out_features, columns]
    kernel.launch(grid, chosen.threads, chosen.shared_bytes(rows, columns), arguments)
    return output


def prepare(
    outputs: int, columns: int, *, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compile and load what any number of rows may need; a CUDA graph's capture allows neither."""
    for rows in PREPARED_ROWS:
        _kernel(plan(rows, outputs, columns), bits, group_size, columns, dtype, device)


def _kernel(
    chosen: Stream | Tile, bits: int, group_size: int, columns: int, dtype: torch.dtype, device: torch.device
) -> _nvrtc.Kernel:
    grouped = 0 if group_size == columns else group_size
    chunks = min(chosen.chunks, 1 if grouped % 128 or columns % 128 else 2)
    return _compiled(chosen, chunks, bits, grouped, dtype == torch.bfloat16, index_of(device))


@functools.cache
def _compiled(
    chosen: Stream | Tile, chunks: int, bits: int, group_size: int, bfloat: bool, device: int
) -> _nvrtc.Kernel:
    cubin = compile_cubin(chosen, chunks, bits, group_size, bfloat)
    return _nvrtc.Kernel(cubin, "multiply_fragments", device)


def compile_cubin(chosen: Stream | Tile, chunks: int, bits: int, group_size: int, bfloat: bool) -> bytes:
    """Machine code for a plan; needs no GPU."""
    macros = {**chosen.macros, "BITS": bits, "GROUP": group_size, "CHUNKS": chunks, "BFLOAT": int(bfloat)}
    return _nvrtc.compile_cubin(SOURCE, ARCHITECTURE, macros, {"wgmma.cuh": wgmma_header(chosen.tokens, bfloat)})


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
