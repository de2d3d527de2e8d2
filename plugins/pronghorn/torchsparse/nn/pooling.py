"""Pooling over all sites of each sample."""

from __future__ import annotations

from torch import Tensor, nn

from pronghorn.torchsparse.samples import batch_size, check_sparse, count_rows, samples_of, sum_rows
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
    samples, count = samples_of(input)
    counts = count_rows(samples, count).clamp_(min=1)[:, None]
    return (sum_rows(input.feats, samples, count) / counts).to(input.feats.dtype)[: batch_size(input)]


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
    samples, count = samples_of(input)
    empty = feats.new_zeros(count, feats.shape[1])
    largest = empty.scatter_reduce(0, samples[:, None].expand_as(feats), feats, "amax", include_self=False)
    return largest[: batch_size(input)]


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
