"""The CUDA kernel of `convolution.cu` for Hopper: where it can run, and how it is launched."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import ARCHITECTURE, aligned, index_of, is_hopper, wgmma_header

SOURCE = Path(__file__).parent / "convolution.cu"
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2}
THREADS, CHUNK, COLUMNS = 384, 64, 256
HEIGHT, WIDTH, CLUSTER = 16, 8, 2  # pixels of a block, and blocks that share weights
CHANNELS = RESULTS = (COLUMNS, 2 * COLUMNS)  # any multiple of 64 channels compiles, but these alone ran on a GPU
X_BYTES, WEIGHT_BYTES, X_SLOTS, STAGES = 23 << 10, COLUMNS * CHUNK * 2, 2, 5
SHARED_BYTES = 1024 + X_SLOTS * X_BYTES + STAGES * WEIGHT_BYTES  # operands begin at multiples of 1024
FULL = 0.75  # share of the time that blocks have work, from which on it is asked for; at a half cuDNN was faster


class Variant(NamedTuple):
    """What the source wants defined."""

    bfloat: bool
    channels: int
    results: int
    activation: int
    biased: bool
    normed: bool
    added: bool

    @property
    def turns(self) -> int:
        """That a block takes for its pixels: a norm needs all of their results."""
        return self.results // COLUMNS if self.normed else 1

    def items(self, x: Tensor) -> int:
        """What clusters have to do, each as long as the others."""
        batch, _, height, width = x.shape
        tiles = batch * -(-height // HEIGHT) * -(-width // WIDTH)
        return -(-tiles // CLUSTER) * (self.results // COLUMNS // self.turns)


def obstacle(x: Tensor, weight: Tensor) -> str:
    """Why the kernel cannot run on tensors like these, or nothing."""
    results, channels = weight.shape[:2]
    if not is_hopper(x.device):
        return "the device is no Hopper GPU"
    if x.dtype != torch.bfloat16:  # float16 compiles, and has not run on a GPU
        return f"x is {x.dtype}, not torch.bfloat16"
    if results not in RESULTS:
        return f"there are {results} results, not {' or '.join(map(str, RESULTS))}"
    if channels not in CHANNELS:
        return f"there are {channels} channels, not {' or '.join(map(str, CHANNELS))}"
    if not x.numel():
        return "there are no pixels"
    return "" if _nvrtc.available() else "the package cuda-bindings is not installed"


def fills(x: Tensor, weight: Tensor, normed: bool) -> bool:
    """Whether blocks have work for most of the time, all pixels in their tiles and all multiprocessors counted."""
    results, channels = weight.shape[:2]
    variant = Variant(x.dtype == torch.bfloat16, channels, results, 0, False, normed, False)
    loaded = _kernel(variant, index_of(x.device))
    rounds = -(-variant.items(x) // loaded.clusters)
    work = x.shape[0] * x.shape[2] * x.shape[3] * (results // COLUMNS)
    return work >= FULL * rounds * loaded.clusters * CLUSTER * variant.turns * HEIGHT * WIDTH


def fused_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """[batch, results, height, width], channels_last."""
    batch, channels, height, width = x.shape
    results = len(weight)
    x, weight = (aligned(tensor.permute(0, 2, 3, 1)) for tensor in (x, weight))
    residual = None if residual is None else aligned(residual.permute(0, 2, 3, 1))
    out = x.new_empty(batch, height, width, results)
    variant = Variant(
        x.dtype == torch.bfloat16, channels, results, ACTIVATIONS[activation], bias is not None,
        norm_weight is not None, residual is not None,
    )  # fmt: skip
    loaded = _kernel(variant, index_of(x.device))
    x_map = _nvrtc.tensor_map(x, (1, HEIGHT + 2, WIDTH + 2, CHUNK))
    # Of 32 results, which are 4 times 4 pairs: first pair 0 of each four, as the kernel multiplies them.
    ordered = weight.view(results // 32, 4, 4, 2, 9 * channels).transpose(1, 2)
    weight_map = _nvrtc.tensor_map(ordered, (4, 4, 4, 2, CHUNK))
    grid = CLUSTER * min(loaded.clusters, variant.items(out.permute(0, 3, 1, 2)))
    kept = out.new_empty((grid, HEIGHT * WIDTH, COLUMNS) if variant.turns == 2 else 0, dtype=torch.float32)
    pointers = [out if tensor is None else tensor.contiguous() for tensor in (bias, norm_weight)]
    arguments = (
        x_map, weight_map, *pointers, out if norm_bias is None else norm_bias.contiguous(), int(norm_bias is not None),
        out if residual is None else residual, kept, out, batch, height, width, float(eps),
    )  # fmt: skip
    loaded.kernel.launch((grid, 1, 1), THREADS, SHARED_BYTES, arguments)
    return out.permute(0, 3, 1, 2)


class Loaded(NamedTuple):
    """A kernel on a device, and how many of its clusters run at once."""

    kernel: _nvrtc.Kernel
    clusters: int


@functools.cache
def _kernel(variant: Variant, device: int) -> Loaded:
    kernel = _nvrtc.Kernel(compile_cubin(variant), "run", device)
    return Loaded(kernel, kernel.most_clusters(CLUSTER, THREADS, SHARED_BYTES))


def compile_cubin(variant: Variant) -> bytes:
    """Machine code of a variant; needs no GPU."""
    header = wgmma_header("multiply", COLUMNS, bfloat=variant.bfloat)
    return _nvrtc.compile_cubin(SOURCE, ARCHITECTURE, macros(variant), {"wgmma.cuh": header})


def macros(variant: Variant) -> dict[str, int]:
    """As the source names them."""
    named = {
        "BFLOAT": variant.bfloat, "CHANNELS": variant.channels, "OUTPUTS": variant.results,
        "ACTIVATION": variant.activation, "BIASED": variant.biased, "NORMED": variant.normed, "ADDED": variant.added,
    }  # fmt: skip
    return {name: int(value) for name, value in named.items()}
