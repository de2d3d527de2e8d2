"""From samples to a batch, and from a batch to a dense grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pronghorn.torchsparse.samples import check_sparse
from pronghorn.torchsparse.tensor import SparseTensor

# What samples of a batch agree in
ALIKE: dict[str, Callable[[SparseTensor], Any]] = {
    "stride": lambda sample: sample.stride,
    "columns of coords": lambda sample: sample.coords.shape[1],
    "channels": lambda sample: sample.feats.shape[1],
    "dtype": lambda sample: sample.feats.dtype,
    "device": lambda sample: sample.feats.device,
    "spatial_range": lambda sample: sample.spatial_range,
}


def sparse_collate(inputs: Sequence[SparseTensor]) -> SparseTensor:
    """One tensor of many samples; sample i gets batch index i.

    Args:
        inputs: samples, each with a batch column of zeros, as SparseTensor wants one even for a single sample. Where
            they have a spatial range, it is (1, *sizes), the same for all.

    Returns:
        Rows of all samples one after another; its spatial range is (number of samples, *sizes).

    Raises:
        TypeError: not all are SparseTensors.
        ValueError: there are none; they differ in stride, dimensions, channels, dtype, device or range; one is a batch.
    """
    if not inputs:
        raise ValueError("inputs: got none, wanted at least one sample")
    for place, sample in enumerate(inputs):
        check_sparse(sample, f"inputs[{place}]")
        for name, of in ALIKE.items():
            if of(sample) != of(inputs[0]):
                raise ValueError(f"inputs[{place}]: got {name} {of(sample)}, wanted {of(inputs[0])}, as inputs[0] has")
        _check_single(sample, place)
    coords = [torch.nn.functional.pad(sample.coords[:, 1:], (1, 0), value=i) for i, sample in enumerate(inputs)]
    sizes = inputs[0].spatial_range
    return SparseTensor(
        torch.cat([sample.feats for sample in inputs]),
        torch.cat(coords),
        inputs[0].stride,
        None if sizes is None else (len(inputs), *sizes[1:]),
    )


def sparse_collate_fn(inputs: Sequence[Any]) -> Any:
    """Make a batch of samples; a `collate_fn` of `torch.utils.data.DataLoader`.

    Args:
        inputs: samples of one kind. SparseTensors become one, by `sparse_collate`; tensors, and NumPy arrays as
            tensors, are stacked; dictionaries with the same keys become one, value by value; anything else is a list.

    Raises:
        TypeError: samples are of several kinds, where the first is none of "anything else".
        ValueError: there are none; keys or shapes differ; or `sparse_collate` raises it.
    """
    return _collated(inputs, "inputs")


def to_dense(feats: Tensor, coords: Tensor, spatial_range: Sequence[int]) -> Tensor:
    """[batch, *sizes, C], zeros where there is no site; waits for the GPU.

    Args:
        feats: [N, C], floating point; gradients flow to it.
        coords: int32 [N, 1 + dimensions], the batch index first.
        spatial_range: (batch size, *sizes).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or a site is out of the range.
    """
    return SparseTensor(feats, coords, spatial_range=spatial_range).dense()


def _check_single(sample: SparseTensor, place: int) -> None:
    if sample.coords[:, 0].any():
        raise ValueError(
            f"inputs[{place}]: its batch column, the first one of coords, is not all zeros; wanted single samples, and "
            "for coords without a batch index torch.nn.functional.pad(coords, (1, 0))"
        )
    if sample.spatial_range is not None and sample.spatial_range[0] != 1:
        raise ValueError(f"inputs[{place}]: got spatial_range {sample.spatial_range}, wanted a batch size of 1")


def _collated(inputs: Sequence[Any], name: str) -> Any:
    if not inputs:
        raise ValueError(f"{name}: got none, wanted at least one sample")
    kind = next((kind for kind in (dict, SparseTensor, Tensor, np.ndarray) if isinstance(inputs[0], kind)), None)
    if kind is None:
        return list(inputs)
    stranger = next((type(value).__name__ for value in inputs if not isinstance(value, kind)), None)
    if stranger is not None:
        raise TypeError(f"{name}: got a {stranger} among {kind.__name__}, wanted values of one kind")
    if kind is SparseTensor:
        return sparse_collate(inputs)
    if kind is dict:
        return _collated_dicts(inputs, name)
    tensors = [torch.tensor(value) if isinstance(value, np.ndarray) else value for value in inputs]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"{name}: got shapes {sorted(shapes)}, wanted one shape to stack")
    return torch.stack(tensors)


def _collated_dicts(inputs: Sequence[dict[Any, Any]], name: str) -> dict[Any, Any]:
    for sample in inputs:
        if sample.keys() != inputs[0].keys():
            raise ValueError(f"{name}: got keys {list(sample)} and {list(inputs[0])}, wanted the same in all samples")
    return {key: _collated([sample[key] for sample in inputs], f"{name}[{key!r}]") for key in inputs[0]}
