"""Sites as 64-bit numbers: hash them, find them again by their hash, count how many points each has."""

from __future__ import annotations

import torch
from torch import Tensor

FNV_OFFSET_BASIS = 14695981039346656037 - 2**64  # as int64, which wraps like the unsigned numbers of the definition
FNV_PRIME = 1099511628211
FOLD_BITS = 60
INT32 = torch.iinfo(torch.int32)


def sphash(coords: Tensor, offsets: Tensor | None = None, *, folded: bool | None = None) -> Tensor:
    """The FNV-1a hash of sites, column by column, each column as one unsigned 32-bit word.

    Args:
        coords: [sites, 4] int32: batch, x, y, z.
        offsets: [kernel volume, 3] int32, added to x, y and z before they are hashed; or None.
        folded: whether the upper 4 bits are folded into the lower 60, which makes every hash positive; None is what
            the official library does: not on a CUDA device, yes on any other.

    Returns:
        [sites] int64, or [kernel volume, sites] with offsets.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: a shape or device is wrong, or a site and an offset add up to more than int32 holds.

    Source: Fowler, Noll and Vo's FNV-1a; TorchSparse v2.1. With offsets, its CPU build moves the batch index and hashes
    the z of the first site for all; here both variants move x, y and z, as its CUDA build does.
    """
    _check_columns("coords", coords, 4)
    columns = coords.long()
    if offsets is not None:
        columns = _moved(coords, offsets)
    hashes = torch.full(columns.shape[:-1], FNV_OFFSET_BASIS, dtype=torch.int64, device=coords.device)
    for column in columns.unbind(-1):
        hashes = (hashes ^ (column & 0xFFFFFFFF)) * FNV_PRIME
    if folded is None:
        folded = coords.device.type != "cuda"
    if not folded:
        return hashes
    # a shift of int64 repeats the sign, so the upper bits are masked
    return ((hashes >> FOLD_BITS) & (2 ** (64 - FOLD_BITS) - 1)) ^ (hashes & (2**FOLD_BITS - 1))


def sphashquery(queries: Tensor, references: Tensor) -> Tensor:
    """Where each hash stands among others.

    Args:
        queries: int64 of any shape.
        references: [sites] int64, hashed in the same way. Of equal ones the last is found.

    Returns:
        Rows of `references`, -1 where there is none; int64 in the shape of `queries`. Nothing is padded, whereas the
        official library pads the first dimension to a multiple of 128.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: `references` is not one-dimensional, or the devices differ.
    """
    for name, tensor in (("queries", queries), ("references", references)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted int64, as sphash gives")
    if references.ndim != 1:
        raise ValueError(f"references: got shape {tuple(references.shape)}, wanted [sites]")
    check_device("references", references, "queries", queries)
    if not references.numel():
        return torch.full_like(queries, -1)
    ordered, rows = references.sort(stable=True)  # stable, so that equal ones stay in the order of their rows
    places = torch.searchsorted(ordered, queries.contiguous(), right=True).sub_(1).clamp_(min=0)
    return torch.where(ordered[places] == queries, rows[places], -1)


def spcount(idx: Tensor, num: int) -> Tensor:
    """How many points each voxel has.

    Args:
        idx: [points] int32 or int64, each point's voxel, -1 for none.
        num: number of voxels.

    Returns:
        [num] int32.

    Raises:
        TypeError: `idx` is not int32 or int64, `num` is not an integer.
        ValueError: `idx` is not one-dimensional or holds rows that are no voxels, `num` is negative.
    """
    if not isinstance(num, int) or isinstance(num, bool):
        raise TypeError(f"num: got {num!r}, wanted an integer")
    if num < 0:
        raise ValueError(f"num: got {num}, wanted 0 or more")
    if idx.ndim != 1:
        raise ValueError(f"idx: got shape {tuple(idx.shape)}, wanted [points]")
    check_rows("idx", idx, num)
    counts = torch.zeros(num + 1, dtype=torch.int32, device=idx.device)
    return counts.index_add_(0, present_or(num, idx), torch.ones_like(idx, dtype=torch.int32))[:num]


def check_rows(name: str, rows: Tensor, count: int) -> None:
    """Check that rows point into a table of `count` rows, or are -1.

    Values are looked at in eager mode only: a graph that is compiled or captured cannot wait for them.

    Raises:
        TypeError: not int32 or int64.
        ValueError: a row is outside -1 to count - 1.
    """
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {rows.dtype}, wanted int32 or int64")
    if not rows.numel() or not _values_readable():
        return
    low, high = torch.stack(rows.aminmax()).tolist()
    if low < -1 or high >= count:
        raise ValueError(f"{name}: got rows {low} to {high}, wanted -1 (missing) to {count - 1}")


def check_device(name: str, tensor: Tensor, wanted_name: str, wanted: Tensor) -> None:
    """Raise a ValueError unless both tensors are on the same device."""
    if tensor.device != wanted.device:
        raise ValueError(f"{name}: got {tensor.device}, wanted {wanted.device}, where {wanted_name} is")


def present_or(spare: int, rows: Tensor) -> Tensor:
    """Rows as int64, with the missing ones (-1) sent to the row `spare`."""
    return torch.where(rows < 0, spare, rows.long())


def _check_columns(name: str, tensor: Tensor, columns: int) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted int32; floor coordinates before they are converted")
    if tensor.ndim != 2 or tensor.shape[1] != columns:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted [rows, {columns}]")


def _moved(coords: Tensor, offsets: Tensor) -> Tensor:
    """Sites plus offsets, [kernel volume, sites, 4] int64."""
    _check_columns("offsets", offsets, 3)
    check_device("offsets", offsets, "coords", coords)
    moved = coords.long() + torch.nn.functional.pad(offsets.long(), (1, 0))[:, None]
    if moved.numel() and _values_readable():
        low, high = torch.stack(moved.aminmax()).tolist()
        if low < INT32.min or high > INT32.max:
            raise ValueError(f"offsets: coords + offsets reach {low} to {high}, wanted {INT32.min} to {INT32.max}")
    return moved


def _values_readable() -> bool:
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
