"""The end of a residual block that shrinks or grows an image: shuffle, shortcut without parameters, and sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor, wants_gradient
from pronghorn.kernels._dispatch import triton_kernels, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.shuffle_shortcut import reference

__all__ = ["shuffle_add", "unshuffle_add"]


def unshuffle_add(main: Tensor, x: Tensor, *, factor: int = 2, bias: Tensor | None = None) -> Tensor:
    """main + bias + the means of groups of consecutive channels of pixel_unshuffle(x, factor).

    Differentiable in `main`, `x` and `bias`. Sums are in float32 (float64 of such an `x`), and in the same order at
    every call.

    Args:
        main: what a convolution gave, in fp16, bf16 or fp32 (fp64 in the reference): [batch, channels, height, width],
            or [batch, channels / factor^2, height * factor, width * factor] of which pixel_unshuffle is taken.
            Contiguous or in the channels_last format; anything else is copied first.
        x: [batch, input channels, height * factor, width * factor], of any floating-point dtype; input channels *
            factor^2 is a multiple of channels. Not in the memory format of `main`, it is copied first.
        factor: by which height and width shrink; 1 for means of channels alone.
        bias: the convolution's, [channels of main], of any floating-point dtype.

    Returns:
        [batch, channels, height, width] in the dtype and the memory format of `main`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Chen et al. (arXiv 2410.10733), section 3.2.
    """
    return _call(main, x, factor, bias, up=False)


def shuffle_add(main: Tensor, x: Tensor, *, factor: int = 2, bias: Tensor | None = None) -> Tensor:
    """main + bias + pixel_shuffle of x, of which each channel is repeated channels * factor^2 / input channels times.

    Differentiable in `main`, `x` and `bias`. Sums are in float32 (float64 of such an `x`), and in the same order at
    every call.

    Args:
        main: what a convolution gave, in fp16, bf16 or fp32 (fp64 in the reference): [batch, channels, height * factor,
            width * factor], or [batch, channels * factor^2, height, width] of which pixel_shuffle is taken.
            Contiguous or in the channels_last format; anything else is copied first.
        x: [batch, input channels, height, width], of any floating-point dtype; channels * factor^2 is a multiple of
            input channels. Not in the memory format of `main`, it is copied first.
        factor: by which height and width grow; 1 to repeat channels alone.
        bias: the convolution's, [channels of main], of any floating-point dtype.

    Returns:
        [batch, channels, height * factor, width * factor] in the dtype and the memory format of `main`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Chen et al. (arXiv 2410.10733), section 3.2.
    """
    return _call(main, x, factor, bias, up=True)


def _call(main: Tensor, x: Tensor, factor: int, bias: Tensor | None, up: bool) -> Tensor:
    check_tensor("main", main, dim=4, floating=True)
    check_tensor("x", x, dim=4, floating=True, like=main)
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor: got {factor!r}, wanted a whole number from 1 on")
    if bias is not None:
        check_tensor("bias", bias, floating=True, like=main)
        check_shape("bias", bias, (main.shape[1],))
    channels = _channels(main, x, factor, up)
    if wants_gradient(main, x, bias):
        result: Tensor = _Differentiable.apply(main, x, bias, channels, factor, up)
    else:
        result = _operation(x, main, bias, channels, factor, up, 1.0, _channels_last(main))
    return result


def _channels(main: Tensor, x: Tensor, factor: int, up: bool) -> int:
    """Of the result; and whether all shapes fit."""
    batch, given, height, width = x.shape
    if not height or not width:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least one pixel")
    if not up and (height % factor or width % factor):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted a height and width that {factor} divides")
    other = (height * factor, width * factor) if up else (height // factor, width // factor)
    # Number by number: the compiler of torch 2.11 finds no tuple of symbolic numbers in another one.
    elsewhere = main.shape[2] == other[0] and main.shape[3] == other[1]
    here = main.shape[2] == height and main.shape[3] == width
    if main.shape[0] != batch or not (elsewhere or here):
        wanted = f"a batch of {batch} and a height and width of {(height, width)} or {other}"
        raise ValueError(f"main: got shape {tuple(main.shape)}, wanted {wanted}")
    area, channels = factor**2, main.shape[1]
    if not elsewhere:
        if up and channels % area:
            raise ValueError(f"main: got {channels} channels, wanted a multiple of {area}")
        channels = channels // area if up else channels * area
    many, few = (channels * area, given) if up else (given * area, channels)
    if not few or not many or many % few:
        wanted = f"a divisor of main's {many}" if up else f"{area} times as many to be a multiple of main's {few}"
        raise ValueError(f"x: got {given} channels, wanted {wanted}")
    return channels


def _channels_last(tensor: Tensor) -> bool:
    """The format that a dense copy of it has."""
    return tensor.stride(1) == 1 and not tensor.is_contiguous()


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, main: Tensor, x: Tensor, bias: Tensor | None, channels: int, factor: int, up: bool) -> Tensor:
        result: Tensor = _operation(x, main, bias, channels, factor, up, 1.0, _channels_last(main))
        ctx.bias = None if bias is None else bias.dtype
        ctx.factor, ctx.up, ctx.dtype = factor, up, x.dtype
        ctx.main = main.shape[1], _channels_last(main), main.shape != result.shape
        ctx.x = x.shape[1], _channels_last(x)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """What was repeated is summed, and what was averaged repeated."""
        of_main = of_x = of_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            channels, last, shuffled = ctx.main
            of_main = _operation(grad, None, None, channels, ctx.factor, not ctx.up, 1.0, last) if shuffled else grad
            if ctx.needs_input_grad[2]:
                wide = torch.promote_types(grad.dtype, torch.float32)
                of_bias = of_main.sum(dim=(0, 2, 3), dtype=wide).to(ctx.bias)
        if ctx.needs_input_grad[1]:
            channels, last = ctx.x
            area = ctx.factor**2
            scale = grad.shape[1] * area / channels if ctx.up else grad.shape[1] / (channels * area)
            of_x = _operation(grad, None, None, channels, ctx.factor, not ctx.up, scale, last).to(ctx.dtype)
        return of_main, of_x, of_bias, None, None, None


def _forward(
    x: Tensor, main: Tensor | None, bias: Tensor | None, channels: int, factor: int, up: bool, scale: float,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    out = reference.empty(x, main, channels, factor, up, channels_last)
    if not out.numel():
        return out
    if use_triton("shuffle_shortcut", x) and torch.float64 not in (x.dtype, out.dtype):
        result: Tensor = triton_kernels("shuffle_shortcut").shuffle_shortcut(x, main, bias, out, factor, up, scale)
        return result
    return out.copy_(reference.shuffle_shortcut(x, main, bias, channels, factor, up, scale))


def _fake(
    x: Tensor, main: Tensor | None, bias: Tensor | None, channels: int, factor: int, up: bool, scale: float,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    return reference.empty(x, main, channels, factor, up, channels_last)


_operation = define("shuffle_shortcut", _forward, _fake)
