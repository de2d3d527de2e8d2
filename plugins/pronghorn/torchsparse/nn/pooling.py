"""Pooling over all sites of each sample."""

from __future__ import annotations

from torch import Tensor, nn

from pronghorn.torchsparse.samples import batch_size, check_sparse, count_rows, sum_rows
from pronghorn.torchsparse.tensor import SparseTensor


def global_avg_pool(input: SparseTensor) -> Tensor:
    """Mean over the sites of each sample; sums are in float32 or better.

    Args:
        input: features [N, C].

    Returns:
        [B, C] in the dtype of the features. B is that of the spatial range, or else the largest batch index + 1. A
        sample without sites gets zeros.

    Raises:
        TypeError: no SparseTensor.
    """
    check_sparse(input)
    samples, batch = input.coords[:, 0].long(), batch_size(input)
    counts = count_rows(samples, batch).clamp_(min=1)[:, None]
    return (sum_rows(input.feats, samples, batch) / counts).to(input.feats.dtype)


def global_max_pool(input: SparseTensor) -> Tensor:
    """Maximum over the sites of each sample; where several are the largest, they share the gradient.

    Args:
        input: features [N, C].

    Returns:
        [B, C] in the dtype of the features. B is that of the spatial range, or else the largest batch index + 1. A
        sample without sites gets zeros, too, rather than an infinity that would spread.

    Raises:
        TypeError: no SparseTensor.
    """
    check_sparse(input)
    feats = input.feats
    samples = input.coords[:, :1].long().expand_as(feats)
    empty = feats.new_zeros(batch_size(input), feats.shape[1])
    return empty.scatter_reduce(0, samples, feats, "amax", include_self=False)


class GlobalAvgPool(nn.Module):
    """`global_avg_pool` as a layer."""

    def forward(self, input: SparseTensor) -> Tensor:
        """[B, C]."""
        return global_avg_pool(input)


class GlobalMaxPool(nn.Module):
    """`global_max_pool` as a layer."""

    def forward(self, input: SparseTensor) -> Tensor:
        """[B, C]."""
        return global_max_pool(input)
