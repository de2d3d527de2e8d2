"""The CUDA kernels of `products.cu` and `attention.cu` for Hopper: where they can run, and how they are launched.

With few tokens a layer's time is that of reading its weights, if that never stops. Between separate kernels it does:
each begins with nothing to read and ends waiting for its last block. These kernels begin ahead of time, ask for their
weights at once, and then wait for the kernel before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import ARCHITECTURE, aligned, index_of, is_hopper, wgmma_header
from pronghorn.kernels.suffix_layers.call import SuffixLayer, unflattened

FOLDER = Path(__file__).parent
THREADS, ROWS, CHUNK = 256, 64, 64
ROW_BYTES = 2 * CHUNK
MOST_TOKENS = ROWS - 1  # one more row has the shift of a norm
SIZE = 256  # of a head
LOG2_E = 1.4426950408889634
SHARED_BYTES = 226 << 10  # that a block can have; the rest is declared in the sources
SWIZZLE = 1024  # bytes after which the swizzle repeats; operands begin at multiples of it
QKV, GATE_UP, ADD, PREPARE = range(4)


class Variant(NamedTuple):
    """A source, what it wants defined, and what it includes."""

    source: str
    macros: tuple[tuple[str, int], ...]
    header: str


@dataclass(frozen=True)
class Product:
    """Tiles of a product: columns of each of the two parts of a tile, and blocks that share K, a cluster."""

    kind: int
    half: int
    split: int

    def blocks(self, outputs: int) -> int:
        """Of a launch."""
        return outputs // (2 * self.half) * self.split

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether tiles and parts of K are whole."""
        return outputs % (2 * self.half) == 0 and inputs % (self.split * CHUNK) == 0

    def lent(self, inputs: int) -> int:
        """Chunks whose weights' place others' sums take; 0 if that were most of them, so that these need their own."""
        lent = -(-self._sum_bytes // (2 * self.half * ROW_BYTES))
        return lent if 2 * lent <= self._chunks(inputs) else 0

    def shared_bytes(self, inputs: int) -> int:
        """Operands, and the sums where these have their own place."""
        operands = self._chunks(inputs) * (2 * self.half + ROWS) * ROW_BYTES
        return operands + (0 if self.lent(inputs) else self._sum_bytes) + SWIZZLE

    def _chunks(self, inputs: int) -> int:
        return inputs // self.split // CHUNK

    @property
    def _sum_bytes(self) -> int:
        rows = ROWS + (0 if self.kind == ADD else self.split)
        return rows * (2 * self.half + 8) * 4

    def variant(self, outputs: int, inputs: int, width: int) -> Variant:
        """Of `products.cu`."""
        macros = {"KIND": self.kind, "HALF": self.half, "SLICE": inputs // self.split, "SPLIT": self.split,
                  "LENT": self.lent(inputs), "WIDTH": width, "PARTS": width // ADDED_COLUMNS}  # fmt: skip
        if self.kind == QKV:
            macros |= {"HEADS": outputs // SIZE - 2, "SIZE": SIZE}
        return Variant("products.cu", tuple(macros.items()), wgmma_header("multiply", self.half))


# What was fastest for the published sizes on an H100. All blocks of a launch fit the GPU at once: clusters of eight
# large blocks find room 15 times, clusters of four blocks of half a multiprocessor 62 times.
QKV_PRODUCT = Product(QKV, half=32, split=2)
OUT_PRODUCT = Product(ADD, half=64, split=8)
GATE_UP_PRODUCT = Product(GATE_UP, half=64, split=2)
DOWN_PRODUCT = Product(ADD, half=64, split=8)
ADDED_COLUMNS = 2 * OUT_PRODUCT.half  # of a tile of what is added to x, of which there is one sum of squares


@dataclass(frozen=True)
class Attention:
    """Tiles of an attention: keys of a block, and blocks of a cluster, the last of which has the tokens' own keys."""

    keys: int
    split: int = 8

    def shared_bytes(self) -> int:
        """Operands; queries and keys leave room for the sums."""
        return (ROWS * SIZE + self.keys * (SIZE + SIZE // 2)) * 2 + SWIZZLE

    def blocks(self, rows: int) -> int:
        """Of a launch; a half of the values' channels each."""
        return -(-rows // ROWS) * 2 * self.split

    def variant(self) -> Variant:
        """Of `attention.cu`."""
        macros = {"KEYS": self.keys, "SIZE": SIZE, "SPLIT": self.split}
        header = wgmma_header("score", self.keys) + wgmma_header("gather", SIZE // 2, registers=True)
        return Variant("attention.cu", tuple(macros.items()), header)


KEYS = (96, 128)  # of a block: shared memory holds 224, and any multiple of 32 compiles, but these alone ran on a GPU
MOST_PREFIX = (Attention(KEYS[-1]).split - 1) * KEYS[-1]


def attention(length: int) -> Attention:
    """Tiles for a prefix of `length` tokens, at most MOST_PREFIX."""
    return next(tiles for tiles in map(Attention, KEYS) if (tiles.split - 1) * tiles.keys >= length)


def obstacle(x: Tensor, layer: SuffixLayer) -> str:
    """Why the kernels cannot run on tokens [tokens, width] and layers like this one, or nothing."""
    if not is_hopper(x.device):
        return "the device is no Hopper GPU"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not torch.bfloat16"
    if not 0 < len(x) <= MOST_TOKENS:
        return f"there are {len(x)} tokens, not 1 to {MOST_TOKENS}"
    if layer.key.shape[1] != SIZE:
        return f"heads have {layer.key.shape[1]} channels, not {SIZE}"
    if not 0 < len(layer.key) <= MOST_PREFIX:
        return f"the prefix has {len(layer.key)} tokens, not 1 to {MOST_PREFIX}"
    width = x.shape[1]
    if width != THREADS * 4:  # a block of PREPARE has a row, four numbers a thread
        return f"x has {width} channels, not {THREADS * 4}"
    for product, weight in _products(layer):
        if not product.fits(*weight.shape) or product.shared_bytes(weight.shape[1]) > SHARED_BYTES:
            return f"a weight of {tuple(weight.shape)} does not divide into tiles"
    return "" if _nvrtc.available() else "the package cuda-bindings is not installed"


def _products(layer: SuffixLayer) -> tuple[tuple[Product, Tensor], ...]:
    return (
        (QKV_PRODUCT, layer.qkv), (OUT_PRODUCT, layer.out), (GATE_UP_PRODUCT, layer.gate_up),
        (DOWN_PRODUCT, layer.down),
    )  # fmt: skip


class Workspace(NamedTuple):
    """What kernels leave each other; every layer writes it anew."""

    z: Tensor
    squares: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor
    inner: Tensor

    @classmethod
    def make(cls, x: Tensor, layer: SuffixLayer) -> Workspace:
        """For tokens x [tokens, width]."""
        tokens, width = x.shape
        squares = x.new_empty(tokens, width // ADDED_COLUMNS, dtype=torch.float32)
        heads = layer.out.shape[1] // SIZE
        return cls(
            x.new_empty(tokens + 1, width), squares, x.new_empty(tokens * heads, SIZE), x.new_empty(tokens, SIZE),
            x.new_empty(tokens, SIZE), x.new_empty(tokens, heads * SIZE), x.new_empty(tokens, layer.down.shape[1]),
        )  # fmt: skip


def suffix_layers(
    x: Tensor, tensors: list[Tensor], prefix_mask: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """[tokens, width]."""
    layers = [SuffixLayer(*map(aligned, layer)) for layer in unflattened(tensors)]
    x, prefix_mask, cos, sin = aligned(x), prefix_mask.contiguous(), aligned(cos.float()), aligned(sin.float())
    work = Workspace.make(x, layers[0])
    _prepare(x, layers[0], work)
    out = torch.empty_like(x)
    for index, layer in enumerate(layers):
        after = layers[min(index + 1, len(layers) - 1)]  # after the last one nobody asks for z
        _one_layer(x, layer, after, out, prefix_mask, cos, sin, eps, work)
        x = out
    return out


def _prepare(x: Tensor, layer: SuffixLayer, work: Workspace) -> None:
    """What the first norm gets; not ahead of time, so that what came before has been written when the others begin."""
    tokens, width = x.shape
    kernel = _kernel(_preparing(width), index_of(x.device))
    kernel.launch((tokens + 1, 1, 1), THREADS, 0, (x, layer.scale, layer.shift, work.z, work.squares, tokens))


def _preparing(width: int) -> Variant:
    macros = {"KIND": PREPARE, "HALF": 8, "SLICE": CHUNK, "SPLIT": 1, "WIDTH": width, "PARTS": width // ADDED_COLUMNS}
    return Variant("products.cu", tuple(macros.items()), "")


def variants(heads: int, width: int, inner: int) -> list[Variant]:
    """Of layers of these sizes, for any number of tokens and any prefix."""
    weights = (
        (QKV_PRODUCT, (heads + 2) * SIZE, width), (OUT_PRODUCT, width, heads * SIZE),
        (GATE_UP_PRODUCT, 2 * inner, width), (DOWN_PRODUCT, width, inner),
    )  # fmt: skip
    products = [product.variant(outputs, inputs, width) for product, outputs, inputs in weights]
    return [_preparing(width), *products, *(Attention(keys).variant() for keys in KEYS)]


def _one_layer(
    x: Tensor, layer: SuffixLayer, after: SuffixLayer, out: Tensor, prefix_mask: Tensor, cos: Tensor, sin: Tensor,
    eps: float, work: Workspace,
) -> None:  # fmt: skip
    """Queue a layer: x to out, which may be x, and `work.z` to what the first norm of `after` gets."""
    _product(
        QKV_PRODUCT, work.z, layer.qkv, eps, squares=work.squares, cos=cos, sin=sin, out=work.query,
        out_key=work.key, out_value=work.value,
    )  # fmt: skip
    _attention(layer, prefix_mask, len(x), work)
    _product(
        OUT_PRODUCT, work.attended, layer.out, eps, residual=x, gate=layer.gate,
        scale=layer.late_scale, shift=layer.late_shift, out=out, z=work.z, out_squares=work.squares,
    )  # fmt: skip
    _product(GATE_UP_PRODUCT, work.z, layer.gate_up, eps, squares=work.squares, out=work.inner)
    _product(
        DOWN_PRODUCT, work.inner, layer.down, eps, residual=out, gate=layer.late_gate,
        scale=after.scale, shift=after.shift, out=out, z=work.z, out_squares=work.squares,
    )  # fmt: skip


def _product(product: Product, x: Tensor, weight: Tensor, eps: float, **tensors: Tensor) -> None:
    outputs, inputs = weight.shape
    width = tensors["out"].shape[1] if product.kind == ADD else inputs
    tokens = len(x) if product.kind == ADD else len(x) - 1
    kernel = _kernel(product.variant(outputs, inputs, width), index_of(x.device))
    names = ("squares", "cos", "sin", "out", "out_key", "out_value", "residual", "gate", "scale", "shift", "z",
             "out_squares")  # fmt: skip
    pointers = [tensors.get(name, x) for name in names]  # a kind does not look at those of others
    maps = _nvrtc.tensor_map(x, (len(x), CHUNK)), _nvrtc.tensor_map(weight, (product.half, CHUNK))
    arguments = (*maps, *pointers, tokens, len(x), outputs, eps)
    kernel.launch((product.blocks(outputs), 1, 1), THREADS, product.shared_bytes(inputs), arguments, ahead=True)


def _attention(layer: SuffixLayer, prefix_mask: Tensor, tokens: int, work: Workspace) -> None:
    length, rows = len(layer.key), len(work.query)
    tiles = attention(length)
    kernel = _kernel(tiles.variant(), index_of(work.query.device))
    keys = (layer.key, layer.value, work.key, work.value)
    maps = [_nvrtc.tensor_map(work.query, (ROWS, CHUNK)), *(_nvrtc.tensor_map(of, (tiles.keys, CHUNK)) for of in keys)]
    arguments = (*maps, prefix_mask, work.attended, rows, tokens, length, SIZE**-0.5 * LOG2_E)
    kernel.launch((tiles.blocks(rows), 1, 1), THREADS, tiles.shared_bytes(), arguments, ahead=True)


@functools.cache
def _kernel(variant: Variant, device: int) -> _nvrtc.Kernel:
    return _nvrtc.Kernel(compile_cubin(variant), "run", device)


def compile_cubin(variant: Variant) -> bytes:
    """Machine code of a variant; needs no GPU."""
    macros = {"BFLOAT": 1, **dict(variant.macros)}
    return _nvrtc.compile_cubin(FOLDER / variant.source, ARCHITECTURE, macros, {"wgmma.cuh": variant.header})
