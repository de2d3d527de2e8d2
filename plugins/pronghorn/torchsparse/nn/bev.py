"""From sites in space to maps seen along one dimension: bird's-eye views, where that dimension is the height.

All layers number dimensions as the columns of coords do: 1 is x, 2 is y, 3 is z. There is no default, as the official
one, 1, meant y as long as the batch index was the last column, and means x since it is the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pronghorn.kernels.strided_coords import coords_bounds
from pronghorn.torchsparse.quantize import make_ntuple
from pronghorn.torchsparse.samples import batch_size, check_sparse, count_rows, merge_sites, sum_rows
from pronghorn.torchsparse.tensor import Range, SparseTensor

MEAN, SUM = "mean", "sum"
Sizes = Sequence[int] | Tensor


class ToBEVReduction(nn.Module):
    """Mean or sum of the sites above each other, at a site of height 0.

    Args:
        dim: the height's column in coords, 1 to the number of dimensions.
        reduction: "mean" or "sum"; sums are in float32 or better.

    Raises:
        ValueError: another `dim` or `reduction`.
    """

    def __init__(self, dim: int, reduction: str = MEAN) -> None:
        super().__init__()
        if reduction not in (MEAN, SUM):
            raise ValueError(f"reduction: got {reduction!r}, accepted are {MEAN}, {SUM}")
        self.dim, self.reduction = _checked_dim(dim), reduction

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Sites in lexicographic order, at the input's stride, with a cache of their own.

        Raises:
            TypeError: no SparseTensor.
            ValueError: it has too few dimensions.
        """
        _check_input(input, self.dim)
        coords, spatial_range = _flattened(input, self.dim)
        sites, rows = merge_sites(coords)
        feats = sum_rows(input.feats, rows, len(sites))
        if self.reduction == MEAN:
            feats = feats / count_rows(rows, len(sites))[:, None]
        return SparseTensor(feats.to(input.feats.dtype), sites, input.stride, spatial_range)

    def extra_repr(self) -> str:
        """What tells layers apart."""
        return f"dim={self.dim}, reduction={self.reduction!r}"


class _HeightWeights(nn.Module):
    """A weight for each height: `kernel` [heights, in_channels, out_channels]; `bias` [1, out_channels] or None."""

    def __init__(self, in_channels: int, out_channels: int, heights: int, dim: int, bias: bool) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("heights", heights)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted a positive number")
        self.in_channels, self.out_channels, self.dim = in_channels, out_channels, _checked_dim(dim)
        self.n_kernels = heights
        self.kernel = nn.Parameter(torch.empty(heights, in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights anew, as the official library does: within ±1/√in_channels, and no bias at first."""
        bound = 1 / math.sqrt(self.in_channels)
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def multiply(self, feats: Tensor, heights: Tensor, index: Tensor, count: int) -> Tensor:
        """Sums [count, out_channels] of each row times its height's weight, plus bias, by `index` [N] int64."""
        sizes = count_rows(heights, self.n_kernels).tolist()
        order = heights.argsort(stable=True)
        parts = feats[order].split(sizes)
        products = torch.cat([part @ weight for part, weight in zip(parts, self.kernel, strict=True)])
        if self.bias is not None:
            products = products + self.bias.to(products.dtype)
        return sum_rows(products, index[order], count).to(products.dtype)

    def extra_repr(self) -> str:
        """What tells layers apart."""
        shown = f"{self.in_channels}, {self.out_channels}, n_kernels={self.n_kernels}, dim={self.dim}"
        return shown if self.bias is not None else f"{shown}, bias=False"


class ToDenseBEVConvolution(_HeightWeights):
    """Features times the weight of their height, summed over the sites above each other, as a dense map.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        shape: sizes of the grid that is mapped, in coordinates of the tensor's own grid: (X, Y, Z).
        offset: its least coordinates; one number, or one for each dimension.
        dim: the height's column in coords, 1 to the number of dimensions.
        bias: add one to each site before they are summed, as the official library does.

    Raises:
        TypeError, ValueError: no sizes of 2 to 4 dimensions, or another `dim`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shape: Sizes,
        offset: int | Sequence[int] = 0,
        *,
        dim: int,
        bias: bool = False,
    ) -> None:
        sizes, first = _checked_grid(shape, offset, dim)
        super().__init__(in_channels, out_channels, sizes[dim - 1], dim, bias)
        self.shape, self.offset = sizes, first

    def forward(self, input: SparseTensor) -> Tensor:
        """[batch, out_channels, *sizes but the height's], contiguous; zeros where there is no site.

        Waits for the GPU, to see how many sites each height has and that all are within the grid.

        Raises:
            TypeError: no SparseTensor.
            ValueError: a site is out of the grid, or channels or dimensions do not fit.
        """
        _check_input(input, self.dim, self.in_channels)
        places, sizes = _places(input, self.shape, self.offset)
        kept = [column for column in range(len(sizes)) if column != self.dim]
        index, count = _ravelled(places, sizes, kept)
        feats = self.multiply(input.feats, places[:, self.dim], index, count)
        return feats.view(*(sizes[column] for column in kept), -1).movedim(-1, 1).contiguous()


class ToBEVConvolution(_HeightWeights):
    """`ToDenseBEVConvolution` at sites of height 0 rather than on a dense map.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        n_kernels: number of heights, from 0.
        stride: by how much the map is coarser than the tensor's own grid, in all other dimensions.
        dim: the height's column in coords, 1 to the number of dimensions.
        bias: add one to each site before they are summed, as the official library does.

    Raises:
        ValueError: a number is not positive, or another `dim`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, n_kernels: int, stride: int = 1, *, dim: int, bias: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, n_kernels, dim, bias)
        if stride < 1:
            raise ValueError(f"stride: got {stride}, wanted a positive number")
        self.stride = stride

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Sites in lexicographic order, at `stride` times the input's stride, with a cache of their own.

        Waits for the GPU, to see how many sites each height has and that all have a weight.

        Raises:
            TypeError: no SparseTensor.
            ValueError: a height has no weight, or channels or dimensions do not fit.
        """
        _check_input(input, self.dim, self.in_channels)
        low, high = coords_bounds(input.coords)[:, self.dim].tolist()
        if low < 0 or high >= self.n_kernels:
            raise ValueError(
                f"input: heights are {low} to {high} in column {self.dim}, wanted 0 to {self.n_kernels - 1}"
            )
        coords, spatial_range = _flattened(input, self.dim, self.stride)
        sites, rows = merge_sites(coords)
        feats = self.multiply(input.feats, input.coords[:, self.dim].long(), rows, len(sites))
        return SparseTensor(feats, sites, tuple(step * self.stride for step in input.stride), spatial_range)

    def extra_repr(self) -> str:
        """What tells layers apart."""
        return f"{super().extra_repr()}, stride={self.stride}"


class ToBEVHeightCompression(nn.Module):
    """A dense map that has the channels of all heights one after another: channel h · channels + c is c at height h.

    Args:
        channels: channels of the input.
        shape: sizes of the grid that is mapped, in coordinates of the tensor's own grid: (X, Y, Z).
        offset: its least coordinates; one number, or one for each dimension.
        dim: the height's column in coords, 1 to the number of dimensions.

    Raises:
        TypeError, ValueError: no sizes of 2 to 4 dimensions, or another `dim`.
    """

    def __init__(self, channels: int, shape: Sizes, offset: int | Sequence[int] = 0, *, dim: int) -> None:
        super().__init__()
        self.shape, self.offset = _checked_grid(shape, offset, dim)
        self.channels, self.dim = channels, dim

    def forward(self, input: SparseTensor) -> Tensor:
        """[batch, heights * channels, *other sizes], contiguous; zeros where there is no site.

        Sites that are there more than once are summed. Waits for the GPU, to see that all are within the grid; the
        official library moves heights that are not to the nearest that is.

        Raises:
            TypeError: no SparseTensor.
            ValueError: a site is out of the grid, or channels or dimensions do not fit.
        """
        _check_input(input, self.dim, self.channels)
        places, sizes = _places(input, self.shape, self.offset)
        kept = [column for column in range(len(sizes)) if column != self.dim]
        index, count = _ravelled(places, sizes, [*kept, self.dim])
        feats = sum_rows(input.feats, index, count).to(input.feats.dtype)
        return feats.view(*(sizes[column] for column in kept), -1).movedim(-1, 1).contiguous()

    def extra_repr(self) -> str:
        """What tells layers apart."""
        return f"channels={self.channels}, shape={self.shape}, offset={self.offset}, dim={self.dim}"


def _checked_dim(dim: int) -> int:
    if type(dim) is not int or not 1 <= dim <= 4:
        raise ValueError(f"dim: got {dim!r}, wanted a column of coords from 1 to 4; column 0 is the batch index")
    return dim


def _checked_grid(shape: Sizes, offset: int | Sequence[int], dim: int) -> tuple[Range, Range]:
    """Sizes and least coordinates of a grid."""
    sizes = make_ntuple(shape, len(shape))
    if not 2 <= len(sizes) <= 4 or min(sizes) < 1:
        raise ValueError(f"shape: got {sizes}, wanted 2 to 4 positive sizes, none for the batch")
    if _checked_dim(dim) > len(sizes):
        raise ValueError(f"dim: got {dim}, wanted 1 to {len(sizes)}, as shape has sizes")
    return sizes, make_ntuple(offset, len(sizes))


def _check_input(input: SparseTensor, dim: int, channels: int | None = None) -> None:
    check_sparse(input)
    if input.coords.shape[1] <= dim:
        raise ValueError(f"input: got coords of {input.coords.shape[1]} columns, wanted column {dim} for the height")
    if channels is not None and input.feats.shape[1] != channels:
        raise ValueError(f"input: got {input.feats.shape[1]} channels, wanted {channels}")


def _flattened(input: SparseTensor, dim: int, stride: int = 1) -> tuple[Tensor, Range | None]:
    """Coordinates with a height of 0, the others divided by the stride; and their range."""
    coords = input.coords.clone()
    coords[:, 1:] = coords[:, 1:].div(stride, rounding_mode="floor")
    coords[:, dim] = 0
    if input.spatial_range is None:
        return coords, None
    sizes = [input.spatial_range[0], *(-(-size // stride) for size in input.spatial_range[1:])]
    sizes[dim] = 1
    return coords, tuple(sizes)


def _places(input: SparseTensor, shape: Range, offset: Range) -> tuple[Tensor, Range]:
    """Places within a grid, int64 [N, 1 + dimensions], the batch index first; and the sizes of all columns."""
    if input.coords.shape[1] != 1 + len(shape):
        raise ValueError(f"input: got coords of {input.coords.shape[1]} columns, wanted {1 + len(shape)} for {shape}")
    sizes, first = (batch_size(input), *shape), torch.tensor((0, *offset))
    found = coords_bounds(input.coords)
    if len(input.coords) and ((found[0] < first).any() or (found[1] >= first + torch.tensor(sizes)).any()):
        raise ValueError(
            f"input: coords {found[0].tolist()} to {found[1].tolist()} are not within shape {shape} from offset "
            f"{offset} and {sizes[0]} samples"
        )
    return input.coords.long() - first.to(input.coords.device), sizes


def _ravelled(places: Tensor, sizes: Range, columns: Sequence[int]) -> tuple[Tensor, int]:
    """One number for each place by some of its columns, the last running fastest; and how many there are."""
    index = torch.zeros_like(places[:, 0])
    for column in columns:
        index = index * sizes[column] + places[:, column]
    return index, math.prod(sizes[column] for column in columns)
