"""Checks of arguments that several operations share; each error names the argument, what it got and what it takes."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTIZED_BITS = (2, 3, 4, 8)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16)


def check_bits(bits: int) -> None:
    """`bits` is a width that weights are quantized to."""
    if bits not in QUANTIZED_BITS:
        raise ValueError(f"bits: got {bits!r}, accepted are {', '.join(map(str, QUANTIZED_BITS))}")


def resolve_group_size(group_size: int, in_features: int) -> int:
    """The length of a group along the input channels; -1 is the whole row."""
    if in_features < 1:
        raise ValueError(f"in_features: got {in_features}, wanted at least 1")
    if group_size == -1:
        return in_features
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"group_size: got {group_size}, accepted are -1 and divisors of in_features {in_features}")
    return group_size


def check_tensor(
    name: str, tensor: Tensor, *, dim: int | None = None, floating: bool | None = None, like: Tensor | None = None
) -> None:
    """`tensor` is a dense tensor of the wanted rank and kind, on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: got layout {tensor.layout}, wanted a dense (strided) tensor")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {dim} dimensions")
    if floating is not None and tensor.dtype not in (FLOATING if floating else INTEGER):
        kind = "a floating-point dtype of 16 bits or more" if floating else "an integer dtype"
        raise TypeError(f"{name}: got {tensor.dtype}, wanted {kind}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: is on {tensor.device}, the other arguments are on {like.device}")


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether one of them needs its gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """`tensor` has exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {tuple(shape)}")
