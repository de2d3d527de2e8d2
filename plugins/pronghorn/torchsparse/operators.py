"""What joins tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pronghorn.torchsparse.samples import check_sparse, merge_sites, sum_rows
from pronghorn.torchsparse.tensor import Range, SparseTensor


def cat(inputs: Sequence[SparseTensor]) -> SparseTensor:
    """Features side by side, at the sites and with the cache of the first tensor.

    Args:
        inputs: tensors of the same sites in the same order. They usually share their coords; where they do not, these
            are compared, for which the GPU is waited for.

    Raises:
        TypeError: not all are SparseTensors.
        ValueError: there are none, or their sites or strides differ.
    """
    _check_all(inputs)
    first = inputs[0]
    for place, other in enumerate(inputs):
        if other.stride != first.stride:
            raise ValueError(f"inputs: {place} has stride {other.stride}, 0 has {first.stride}")
        if other.coords is not first.coords and not torch.equal(other.coords, first.coords):
            raise ValueError(
                f"inputs: {place} has other sites ({tuple(other.coords.shape)}) than 0 ({tuple(first.coords.shape)})"
            )
    return first.replace(torch.cat([other.feats for other in inputs], dim=1))


def generative_add(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """Sum of two tensors at the sites of either; sums are in float32 or better.

    Returns:
        Sites in lexicographic order, each once, with a cache of their own. The spatial range holds both, or is None
        where one of them has none.

    Raises:
        TypeError: not both are SparseTensors.
        ValueError: channels, dimensions, strides or devices differ.
    """
    _check_all((a, b))
    for name, ours, theirs in (
        ("channels", a.feats.shape[1], b.feats.shape[1]),
        ("columns of coords", a.coords.shape[1], b.coords.shape[1]),
        ("stride", a.stride, b.stride),
        ("device", a.feats.device, b.feats.device),
    ):
        if ours != theirs:
            raise ValueError(f"b: got {name} {theirs}, wanted {ours}, as a has")
    sites, rows = merge_sites(torch.cat([a.coords, b.coords]))
    feats = torch.cat([a.feats, b.feats])
    sums = sum_rows(feats, rows, len(sites)).to(feats.dtype)
    return SparseTensor(sums, sites, a.stride, _hull(a.spatial_range, b.spatial_range))


def _check_all(inputs: Sequence[SparseTensor]) -> None:
    if not inputs:
        raise ValueError("inputs: got none, wanted at least one")
    for place, given in enumerate(inputs):
        check_sparse(given, f"inputs[{place}]")


def _hull(a: Range | None, b: Range | None) -> Range | None:
    return None if a is None or b is None else tuple(map(max, a, b))
