"""Normalisation over all sites, or over those of each sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pronghorn.kernels.batch_norm import batch_norm
from pronghorn.torchsparse.nn.activation import fapply
from pronghorn.torchsparse.samples import check_sparse, count_rows, samples_of, sum_rows
from pronghorn.torchsparse.tensor import SparseTensor


class BatchNorm(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the sites of all samples together."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """The same sites with other features.

        Raises:
            TypeError: no SparseTensor.
            ValueError: statistics of fewer than 2 sites are asked for.
        """
        check_sparse(input)
        if not self.training and self.running_mean is not None:
            return fapply(input, self._known_statistics if torch.compiler.is_compiling() else super().forward)
        if input.filled_up:
            return fapply(input, self._of_sites, input.count())
        if not _at_least_two(input):
            raise ValueError(
                f"input: got {len(input.feats)} sites, wanted at least 2 for statistics; evaluate, or leave out "
                "batches without sites"
            )
        return fapply(input, super().forward)

    def _known_statistics(self, feats: Tensor) -> Tensor:
        """What torch's function computes, which does not compile where there may be no sites."""
        assert self.running_mean is not None and self.running_var is not None  # noqa: S101, PT018
        scale = (self.running_var + self.eps).rsqrt()
        result = (feats.to(scale.dtype) - self.running_mean) * scale
        if self.affine:
            result = result * self.weight + self.bias
        return result.to(feats.dtype)

    def _of_sites(self, feats: Tensor, count: Tensor) -> Tensor:
        """With the statistics of the rows that are sites; the others become, and pass on, zeros."""
        # More sites than a graph has room for: it is then run anew with more, and what comes out here is dropped.
        count = count.clamp(max=len(feats))
        y, mean, variance = batch_norm(feats, count, self.weight, self.bias, eps=self.eps)
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None  # noqa: S101 - there with the others
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean += (mean - self.running_mean) * share
                self.running_var += (variance * count / (count - 1) - self.running_var) * share
        return y


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` over the sites of each sample by itself.

    Statistics are in float32 or better, in training and in evaluation alike. A sample without sites has none; where a
    group has one value only, it is normalised to zero.

    Source: Wu and He, Group Normalization (ECCV 2018); TorchSparse v2.1 for samples of any number of sites.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """The same sites with other features, in the dtype of the input; waits for the GPU where there is no range.

        Raises:
            TypeError: no SparseTensor.
            ValueError: it has another number of channels.
        """
        check_sparse(input)
        if input.feats.shape[1] != self.num_channels:
            raise ValueError(f"input: got {input.feats.shape[1]} channels, wanted {self.num_channels}")
        samples, count = samples_of(input)
        normalised = _normalise(input.feats, samples, count, self.num_groups, self.eps)
        if self.weight is not None:
            normalised = normalised * self.weight
        if self.bias is not None:
            normalised = normalised + self.bias
        return input.replace(normalised.to(input.feats.dtype))


class InstanceNorm(GroupNorm):
    """Normalisation of each channel over the sites of each sample; `GroupNorm` with a group for each channel.

    The official module hands [N, C] to `torch.nn.InstanceNorm1d`, which normalises over the channels of each site.

    Args:
        num_features: channels.
        eps: added to the variance.
        affine: learn a weight and a bias.

    Source: Ulyanov et al., Instance Normalization (arXiv 1607.08022).
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__(num_features, num_features, eps=eps, affine=affine)

    def extra_repr(self) -> str:
        """What tells layers apart."""
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"


def _at_least_two(input: SparseTensor) -> bool:
    if torch.compiler.is_compiling():  # a number of sites that is not known yet is looked at when it runs
        torch._check(len(input.feats) >= 2, lambda: "input: got fewer than 2 sites, wanted at least 2 for statistics")
        return True
    return len(input.feats) >= 2


def _normalise(feats: Tensor, samples: Tensor, batch: int, groups: int, eps: float) -> Tensor:
    """Features [N, C] less the mean of their sample and group, over its standard deviation; in float32 or better."""
    values = feats.to(torch.promote_types(feats.dtype, torch.float32)).unflatten(1, (groups, -1))
    size = (count_rows(samples, batch) * values.shape[2]).clamp_(min=1)[:, None]
    means = sum_rows(values.sum(2), samples, batch) / size
    centred = values - means[samples][..., None]
    # in two passes, as a difference of squares cancels
    variances = sum_rows(centred.square().sum(2), samples, batch) / size
    return (centred * (variances + eps).rsqrt()[samples][..., None]).flatten(1)
