"""Activations, and any other function of features, at the same sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pronghorn.torchsparse.samples import check_sparse
from pronghorn.torchsparse.tensor import SparseTensor


def fapply(input: SparseTensor, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> SparseTensor:
    """Apply a function to features; sites and what is known of them stay.

    Args:
        input: features [N, C].
        fn: takes the features, then `args` and `kwargs`; gives a tensor of N rows and any number of channels.
        args: passed on.
        kwargs: passed on.

    Raises:
        TypeError: `input` is no SparseTensor, or `fn` gives no tensor.
        ValueError: `fn` gives another number of rows.
    """
    check_sparse(input)
    feats = fn(input.feats, *args, **kwargs)
    if not isinstance(feats, Tensor):
        raise TypeError(f"fn: gave {type(feats).__name__}, wanted a tensor")
    if feats.dim() != 2 or len(feats) != len(input.feats):
        raise ValueError(f"fn: gave {tuple(feats.shape)}, wanted [{len(input.feats)}, channels]")
    return input.replace(feats)


def relu(input: SparseTensor, inplace: bool = False) -> SparseTensor:
    """ReLU; the official library overwrites its input by default."""
    return fapply(input, functional.relu, inplace=inplace)


def leaky_relu(input: SparseTensor, negative_slope: float = 0.1, inplace: bool = False) -> SparseTensor:
    """Leaky ReLU. The slope is 0.1 by default, as in the official library, and 0.01 in the module `LeakyReLU`."""
    return fapply(input, functional.leaky_relu, negative_slope=negative_slope, inplace=inplace)


def silu(input: SparseTensor, inplace: bool = False) -> SparseTensor:
    """SiLU, x · sigmoid(x)."""
    return fapply(input, functional.silu, inplace=inplace)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` of a SparseTensor."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """The same sites with other features."""
        return fapply(input, super().forward)


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU` of a SparseTensor, with its default slope of 0.01."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """The same sites with other features."""
        return fapply(input, super().forward)


class SiLU(nn.SiLU):
    """`torch.nn.SiLU` of a SparseTensor."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """The same sites with other features."""
        return fapply(input, super().forward)
