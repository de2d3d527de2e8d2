"""Which rows belong together: those of one sample, and those that fall onto one site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.tensor import SparseTensor


def check_sparse(input: Any, name: str = "input") -> None:
    """Raise a TypeError unless it is a SparseTensor."""
    if not isinstance(input, SparseTensor):
        raise TypeError(f"{name}: got {type(input).__name__}, wanted a SparseTensor")


def batch_size(input: SparseTensor) -> int:
    """Number of samples: of the spatial range, or else up to the largest batch index, for which the GPU is waited for.

    Raises:
        ValueError: there is no spatial range, and coordinates are negative where that is not allowed.
    """
    return int(input.bounds()[1, 0]) + 1 if input.spatial_range is None else input.spatial_range[0]


def samples_of(input: SparseTensor) -> tuple[Tensor, int]:
    """Sample of each row, int64 [N], and how many they are: rows that are no sites are of one more, the last."""
    samples, batch = input.coords[:, 0].long(), batch_size(input)
    if not input.filled_up:
        return samples, batch
    return torch.where(samples < 0, batch, samples), batch + 1


def merge_sites(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Every site once.

    Args:
        coords: [rows, columns], integers.

    Returns:
        Sites [sites, columns] in lexicographic order, and the site of each row, [rows] int64.
    """
    sites, rows = torch.unique(coords, dim=0, return_inverse=True)
    return sites, rows


def count_rows(index: Tensor, count: int) -> Tensor:
    """How often each of 0 … `count` - 1 occurs in `index`, int64 [count]; nothing is waited for."""
    return index.new_zeros(count).index_add_(0, index, torch.ones_like(index))


def sum_rows(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of the rows that share an index. Gradients flow to `values`.

    Args:
        values: [rows, channels], floating point.
        index: [rows] int64, from 0 to `count` - 1.
        count: number of sums.

    Returns:
        [count, channels] in float32, or float64 where `values` is; zeros where there is no row.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    sums = values.new_zeros(count, values.shape[1])
    if settings.deterministic and values.is_cuda:  # index_add is atomic there, index_put sorts
        return sums.index_put((index,), values, accumulate=True)
    return sums.index_add(0, index, values)
