"""The layers of a pi0.5's action expert: a few tokens through all of them, against a cached prefix, for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import unforced, use_cuda, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.suffix_layers import cuda, reference
from pronghorn.kernels.suffix_layers.call import SuffixLayer

__all__ = ["SuffixLayer", "runs_fused", "suffix_layers"]

INSTEAD = "its reference implementation"  # there is no Triton kernel


def suffix_layers(
    x: Tensor, layers: Sequence[SuffixLayer], prefix_mask: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Gemma layers with adaptive norms, one key/value head and gated residuals, of one sequence.

    Each adds gate * attention(norm(x)) and then late_gate * feed_forward(late_norm(x)), with norm(x) =
    x / rms(x) * (1 + scale) + shift; a token sees all real tokens of the prefix and all of these; the feed-forward is
    down(gelu(gate) * up), GELU by its tanh.

    For inference: nothing is differentiable. It has no Triton kernel: where its CUDA kernels cannot run, its reference
    does, which is slow (`runs_fused` tells).

    Args:
        x: [tokens, width] in fp16, bf16 or fp32 (fp64 in the reference).
        layers: at least one, their tensors in the dtype of x; keys and values finite also where they are masked out.
        prefix_mask: bool [prefix tokens], True for real tokens.
        cos: [tokens, head_dim] in fp32 or fp64, of the rotary positions, whose halves are paired.
        sin: the same.
        eps: of the norms, > 0.

    Returns:
        [tokens, width]: x, with what all layers added.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Black et al., pi0.5 (arXiv 2504.16054); Gemma (arXiv 2403.08295).
    """
    check_tensor("x", x, dim=2, floating=True)
    tokens, width = x.shape
    check_tensor("cos", cos, dim=2, like=x)
    size = cos.shape[1]
    if not size or size % 2:
        raise ValueError(f"cos: got {size} channels, wanted an even number")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(name, tensor, like=x)
        check_shape(name, tensor, (tokens, size))
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: got {tensor.dtype}, wanted torch.float32 or torch.float64")
    if not layers:
        raise ValueError("layers: got none, wanted at least one")
    check_tensor("prefix_mask", prefix_mask, dim=1, like=x)
    if prefix_mask.dtype != torch.bool:
        raise TypeError(f"prefix_mask: got {prefix_mask.dtype}, wanted torch.bool")
    heads, inner = layers[0].qkv.shape[0] // size - 2, layers[0].gate_up.shape[0] // 2
    if heads < 1:
        raise ValueError(f"layers[0].qkv: got {layers[0].qkv.shape[0]} rows, wanted 3 heads of {size} or more")
    prefix = len(prefix_mask)
    shapes: list[tuple[int, ...]] = [
        ((heads + 2) * size, width), (width, heads * size), (2 * inner, width), (width, inner), *[(width,)] * 6,
        *[(prefix, size)] * 2,
    ]  # fmt: skip
    for index, layer in enumerate(layers):
        for field, tensor, shape in zip(SuffixLayer._fields, layer, shapes, strict=True):
            name = f"layers[{index}].{field}"
            check_tensor(name, tensor, like=x)
            check_shape(name, tensor, shape)
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, wanted that of x, {x.dtype}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, wanted a positive number")
    tensors = [tensor.detach() for layer in layers for tensor in layer]
    result: Tensor = _operation(x.detach(), tensors, prefix_mask, cos.detach(), sin.detach(), eps)
    return result


def runs_fused(x: Tensor, layer: SuffixLayer) -> bool:
    """Whether the CUDA kernels run on tokens [tokens, width] and layers like this one."""
    return unforced() and not cuda.obstacle(x, layer)


def _forward(x: Tensor, tensors: list[Tensor], prefix_mask: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    first = SuffixLayer(*tensors[: len(SuffixLayer._fields)])
    if use_triton("suffix_layers", x) and use_cuda("suffix_layers", cuda.obstacle(x, first), INSTEAD):
        return cuda.suffix_layers(x, tensors, prefix_mask, cos, sin, eps)
    return reference.suffix_layers(x, tensors, prefix_mask, cos, sin, eps)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operation = define("suffix_layers", _forward, _fake)
