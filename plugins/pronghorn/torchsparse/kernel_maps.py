"""Which sites a convolution has, and which inputs each of them multiplies with each weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.kernel_map import GRID, kernel_map
from pronghorn.kernels.sparse_convolution import CountedMap, SortedMap, sort_map
from pronghorn.kernels.strided_coords import strided_coords, strided_coords_within
from pronghorn.torchsparse.quantize import make_ntuple
from pronghorn.torchsparse.tensor import Range, SparseTensor, Stride

Numbers = int | tuple[int, ...]

TILE = 128  # rows to which maps are filled up where they are shown as the library had them


class Geometry(NamedTuple):
    """What a kernel map depends on, besides coordinates. One number for each dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kmap_mode: str
    downsample_mode: str

    @property
    def volume(self) -> int:
        """Number of offsets."""
        return math.prod(self.kernel_size)

    @property
    def strided(self) -> bool:
        """Whether outputs lie on another grid than inputs."""
        return max(self.stride) > 1

    @property
    def floored(self) -> bool:
        """Whether the sites of a strided convolution are the cells that inputs fall into, whatever the kernel."""
        whole_cells = all(step in (1, size) for step, size in zip(self.stride, self.kernel_size, strict=True))
        return self.downsample_mode == "minkowski" or (self.kmap_mode == "hashmap" and whole_cells)


def kernel_indices(kernel_size: Sequence[int]) -> Tensor:
    """Index along each dimension of every weight, int64 [kernel volume, dimensions].

    The first dimension runs fastest where the volume is odd, the last one where it is even.
    """
    odd = torch.Size(kernel_size).numel() % 2 == 1
    ranges = [torch.arange(size) for size in (kernel_size[::-1] if odd else kernel_size)]
    found = torch.cartesian_prod(*ranges).view(-1, len(kernel_size))
    return found.flip(1) if odd else found


def get_kernel_offsets(
    size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    device: torch.device | str = "cpu",
    *,
    ndim: int = 3,
) -> Tensor:
    """Offsets of a centred kernel, int32 [kernel volume, dimensions], in the order of the weights.

    Args:
        size: of the kernel; 3 reaches from -1 to 1, 2 from 0 to 1, 4 from -1 to 2.
        stride: what a step is.
        dilation: of the kernel.
        device: where they are wanted.
        ndim: number of dimensions, where `size` is one number.
    """
    dimensions = ndim if isinstance(size, int) else len(size)
    sizes, steps, dilations = (make_ntuple(value, dimensions) for value in (size, stride, dilation))
    first = torch.tensor([(edge - 1) // 2 for edge in sizes])
    return ((kernel_indices(sizes) - first) * torch.tensor(steps) * torch.tensor(dilations)).int().to(device)


@functools.cache  # for ever: a CUDA graph reads them
def _offsets(geometry: Geometry, device: torch.device) -> Tensor:
    """int32 [kernel volume, 1 + dimensions]: where the input of output 0 lies for each weight."""
    sizes, dilation = torch.tensor(geometry.kernel_size), torch.tensor(geometry.dilation)
    centred = (sizes - 1) // 2 * dilation
    if not geometry.strided:
        even = geometry.volume % 2 == 0 and geometry.kmap_mode != "hashmap"
        first = torch.zeros_like(centred) if even else -centred
    elif geometry.kmap_mode == "hashmap" or geometry.downsample_mode == "minkowski":
        first = -centred
    else:
        first = -torch.tensor(geometry.padding)
    return _with_batch(first + kernel_indices(geometry.kernel_size) * dilation).to(device)


@functools.cache  # for ever: a CUDA graph reads them
def _reach(geometry: Geometry, device: torch.device) -> Tensor:
    """int32 [offsets, 1 + dimensions] by which an input lies from the sites that it makes."""
    if geometry.floored:
        return _with_batch(kernel_indices(geometry.stride)).to(device)
    inside = kernel_indices(geometry.kernel_size) * torch.tensor(geometry.dilation)
    return _with_batch(inside - torch.tensor(geometry.padding)).to(device)


def _with_batch(offsets: Tensor) -> Tensor:
    return torch.nn.functional.pad(offsets, (1, 0)).int()


@dataclass
class KernelMap:
    """A map, and what is derived from it when it is first asked for.

    Attributes:
        found: int32 [kernel volume, outputs]: input rows, -1 where there is none.
        coords: of the inputs and of the outputs.
        stride: of the tensor that goes in.
        spatial_range: of the tensor that goes in.
        counts: of inputs and outputs, where rows are filled up: how many of them are sites, int32 [1].
    """

    found: Tensor
    coords: tuple[Tensor, Tensor]
    stride: Stride
    spatial_range: Range | None
    counts: tuple[Tensor | None, Tensor | None] = (None, None)

    def __post_init__(self) -> None:
        self._transposed: Tensor | None = None
        self._sorted: dict[tuple[bool, int], SortedMap] = {}
        self._pairs: tuple[Tensor, Tensor, Tensor] | None = None
        self._sizes: list[int] | None = None

    @property
    def transposed(self) -> Tensor:
        """int32 [kernel volume, inputs]: output rows, -1 where there is none."""
        if self._transposed is None:
            self._transposed = transpose_kernel_map(self.found, len(self.coords[0]))
        return self._transposed

    def table(self, *, transposed: bool = False) -> Tensor | CountedMap:
        """The map, or its transpose, as convolution takes it."""
        plain, count = (self.transposed, self.counts[0]) if transposed else (self.found, self.counts[1])
        return plain if count is None else CountedMap(plain, count)

    def sorted(self, splits: int, *, transposed: bool = False) -> SortedMap:
        """The map, or its transpose, with outputs sorted by the offsets that they have."""
        key = transposed, splits
        if key not in self._sorted:
            self._sorted[key] = sort_map(self.transposed if transposed else self.found, splits=splits)
        return self._sorted[key]

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """int32 [2, pairs]: input and output rows, by offset and output; int32 [volume + 1]: where offsets begin."""
        rows, starts, _ = self._counted()
        return rows, starts

    @property
    def sizes(self) -> list[int]:
        """Pairs of each offset; waits for the GPU."""
        if self._sizes is None:
            self._sizes = self._counted()[2].tolist()
        return self._sizes

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._pairs is None:
            k, output = (self.found >= 0).nonzero(as_tuple=True)
            rows = torch.stack([self.found[k, output], output.int()])
            counts = torch.bincount(k, minlength=len(self.found))
            self._pairs = rows, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), counts
        return self._pairs

    @property
    def out_in_map(self) -> Tensor:
        """int32 [outputs, kernel volume], filled up with -1 to whole tiles of 128."""
        return _filled_up(self.found)

    @property
    def out_in_map_bwd(self) -> Tensor:
        """int32 [inputs, kernel volume], likewise."""
        return _filled_up(self.transposed)


def _filled_up(found: Tensor) -> Tensor:
    return torch.nn.functional.pad(found, (0, -found.shape[1] % TILE), value=-1).T.contiguous()


def transpose_kernel_map(found: Tensor, inputs: int) -> Tensor:
    """The outputs of each input, int32 [kernel volume, inputs], of a map int32 [kernel volume, outputs]."""
    result = found.new_full((len(found), inputs + 1), -1)
    rows = torch.where(found < 0, inputs, found).long()
    outputs = torch.arange(found.shape[1], dtype=torch.int32, device=found.device)
    return result.scatter_(1, rows, outputs.expand_as(found))[:, :inputs].contiguous()


def build_kernel_map(tensor: SparseTensor, geometry: Geometry) -> KernelMap:
    """The map of a convolution of a tensor; it is kept in the tensor's cache, by all that it depends on.

    Raises:
        ValueError: coordinates are negative, or overflow.
    """
    key = (tensor.stride, *geometry)
    known = tensor._caches.kmaps.get(key)
    if known is not None and known.coords[0] is tensor.coords:
        return known
    device, table = tensor.coords.device, GRID if geometry.kmap_mode == "grid" else ""
    bounds = tensor.bounds()
    sites = _sites(tensor, geometry, bounds, key) if geometry.strided else tensor.coords
    # By the middle of an odd kernel every row sees itself, also where another has the same coordinates.
    centred = not geometry.strided and all(size % 2 for size in geometry.kernel_size)
    found = kernel_map(
        tensor.coords, sites, _offsets(geometry, device), stride=(1, *geometry.stride), bounds=bounds, table=table,
        own=geometry.volume // 2 if centred else -1,
    )  # fmt: skip
    result = KernelMap(found, (tensor.coords, sites), tensor.stride, tensor.spatial_range)
    if tensor._caches.room is not None:
        result.counts = tensor._caches.room.count_of(tensor.coords), tensor._caches.room.count_of(sites)
    tensor._caches.kmaps[key] = result
    return result


def _sites(tensor: SparseTensor, geometry: Geometry, bounds: Tensor, key: Any) -> Tensor:
    """Sites of a strided convolution: as many as there are, or filled up to what a CUDA graph has room for."""
    coords, reach = tensor.coords, _reach(geometry, tensor.coords.device)
    stride, within = (1, *geometry.stride), _out_bounds(bounds, geometry)
    room = tensor._caches.room
    if room is None:
        return strided_coords(coords, reach, stride=stride, bounds=within)
    if key not in room.rows:
        raise ValueError(f"a convolution of {geometry} at stride {tensor.stride} was not there in the first run")
    sites, count = strided_coords_within(coords, reach, stride=stride, bounds=within, capacity=room.rows[key])
    room.counts[key] = sites, count
    return sites


def _out_bounds(bounds: Tensor, geometry: Geometry) -> Tensor:
    """Least and largest site there may be, int64 [2, 1 + dimensions] on the CPU."""
    lower, upper = bounds[:, 1:]
    stride, padding = torch.tensor(geometry.stride), torch.tensor(geometry.padding)
    extent = (torch.tensor(geometry.kernel_size) - 1) * torch.tensor(geometry.dilation)
    if geometry.floored:
        last = upper.div(stride, rounding_mode="floor")
        first = lower.div(stride, rounding_mode="floor")
    else:
        last = (upper + 2 * padding - extent).div(stride, rounding_mode="floor")
        first = (lower + padding - extent).div(stride, rounding_mode="floor").clamp_max(0)
        first = torch.where(lower < 0, first, 0)
    return torch.cat([bounds[:, :1], torch.stack([first, last])], dim=1)


def out_spatial_range(spatial_range: Range | None, geometry: Geometry) -> Range | None:
    """Range of the outputs."""
    if spatial_range is None or not geometry.strided:
        return spatial_range
    sizes = zip(spatial_range[1:], *geometry[:4], strict=True)
    return (
        spatial_range[0],
        *(max(0, (size + 2 * pad - (k - 1) * dilation - 1) // s + 1) for size, k, s, pad, dilation in sizes),
    )


@functools.lru_cache(maxsize=1024)
def geometry_of(
    kernel_size: Numbers, stride: Numbers, padding: Numbers, dilation: Numbers, dimensions: int, kmap_mode: str,
    downsample_mode: str,
) -> Geometry:  # fmt: skip
    """A layer's geometry; padding is what centres the kernel on each odd edge without a stride.

    Args:
        kernel_size: one number, or one for each dimension.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        dimensions: how many there are.
        kmap_mode: see `ConvConfig`.
        downsample_mode: see `ConvConfig`.

    Raises:
        ValueError, TypeError: a number is too small, or there are not as many as dimensions.
    """
    values = {}
    for name, given, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    ):  # fmt: skip
        values[name] = make_ntuple(given, dimensions, name=name)
        if min(values[name]) < least:
            raise ValueError(f"{name}: got {given}, wanted numbers of at least {least}")
    values["padding"] = tuple(
        (size - 1) // 2 * wide if size % 2 and step == 1 else pad
        for size, step, pad, wide in zip(*values.values(), strict=True)
    )
    return Geometry(**values, kmap_mode=kmap_mode, downsample_mode=downsample_mode)
