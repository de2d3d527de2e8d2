"""Outputs with the same neighbours side by side, so that a tile of them passes over offsets that none of them has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.sparse_convolution.tiles import MOST_BITS, TILE


class SortedMap(NamedTuple):
    """A kernel map whose outputs are sorted, for each split of its offsets by itself.

    Attributes:
        kernel_map: int32 [kernel volume, outputs]; column j of offset k belongs to output order[split of k, j].
        order: int32 [splits, outputs].
        active: int32 [splits, tiles, offsets of a split]: offsets that a tile has, then -1.
        counts: int32 [splits, tiles]: how many they are.
    """

    kernel_map: Tensor
    order: Tensor
    active: Tensor
    counts: Tensor


class CountedMap(NamedTuple):
    """A kernel map whose last outputs are none: tiles of them are passed over.

    Attributes:
        kernel_map: int32 [kernel volume, outputs].
        outputs: int32 [1]: those from this number on have -1 at every offset.
    """

    kernel_map: Tensor
    outputs: Tensor


def sort_map(kernel_map: Tensor, *, splits: int = 1) -> SortedMap:
    """Sort outputs by the bits of the offsets that they have, descending as signed numbers.

    Args:
        kernel_map: int32 [kernel volume, outputs], -1 where there is no row.
        splits: parts of the offsets that are sorted, and later summed, by themselves; of up to 32 offsets each.

    Raises:
        ValueError: too few splits for the kernel volume, or more than offsets.

    Source: Yan et al., SpConv 2 (masks and sorting); Tang et al. (MICRO 2023), section 3 (splits).
    """
    volume = kernel_map.shape[0]
    least = -(-volume // MOST_BITS)
    if not least <= splits <= max(volume, 1):
        raise ValueError(f"splits: got {splits}, wanted {least} to {max(volume, 1)} for a kernel volume of {volume}")
    return SortedMap(*_operation(kernel_map, splits))


def _sort_map(kernel_map: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = -(-kernel_map.shape[0] // splits)
    masks = bitmasks(kernel_map, splits)
    masks, order = masks.sort(dim=1, descending=True, stable=True)
    if _triton(kernel_map):
        from pronghorn.kernels.sparse_convolution import triton

        return triton.in_order(kernel_map, masks, order, width)
    columns = torch.cat([
        part.gather(1, order[split].expand(len(part), -1))
        for split, part in enumerate(kernel_map.split(width))
    ])  # fmt: skip
    active, counts = _active(reduced(masks, TILE), width)
    return columns, order.int(), active, counts


def _shapes(kernel_map: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (volume, outputs), tiles = kernel_map.shape, -(-kernel_map.shape[1] // TILE)
    return (
        kernel_map.new_empty(volume, outputs), kernel_map.new_empty(splits, outputs),
        kernel_map.new_empty(splits, tiles, -(-volume // splits)), kernel_map.new_empty(splits, tiles),
    )  # fmt: skip


_operation = define("sort_map", _sort_map, _shapes)


def _triton(kernel_map: Tensor) -> bool:
    return use_triton("sort_map", kernel_map) and kernel_map.numel() > 0


def bitmasks(kernel_map: Tensor, splits: int) -> Tensor:
    """int32 [splits, outputs]: bit i is set where an output has offset i of the split."""
    width = -(-kernel_map.shape[0] // splits)
    if _triton(kernel_map):
        from pronghorn.kernels.sparse_convolution import triton

        return triton.bitmasks(kernel_map, splits, width)
    bits = (1 << torch.arange(width, device=kernel_map.device)).long()
    parts = [((part >= 0) * bits[: len(part), None]).sum(dim=0) for part in kernel_map.split(width)]
    parts += [torch.zeros_like(parts[0])] * (splits - len(parts))  # a volume of 4 in 3 splits of 2 leaves one empty
    return torch.stack(parts).to(torch.int32)  # bit 31 makes it negative


def reduced(masks: Tensor, tile: int) -> Tensor:
    """int32 [splits, tiles]: what any output of a tile has."""
    splits, outputs = masks.shape
    tiles = -(-outputs // tile)
    padded = torch.nn.functional.pad(masks, (0, tiles * tile - outputs)).view(splits, tiles, tile)
    while padded.shape[2] > 1:
        half = padded.shape[2] // 2
        padded = padded[:, :, :half] | padded[:, :, half:]
    return padded[:, :, 0]


def _active(tiles: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Offsets of each tile, in order, and how many they are."""
    index = torch.arange(width, device=tiles.device)
    has = (tiles[..., None] >> index) & 1 == 1
    order = torch.where(has, index, width).sort(dim=2).values
    return torch.where(order < width, order, -1).int(), has.sum(dim=2).int()
