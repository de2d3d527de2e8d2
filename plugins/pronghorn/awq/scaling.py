"""Activation-aware scales: how a candidate is made and how it is folded into a block (AWQ, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.awq.layers import ScaledActivation

SMALLEST_SCALE = 1e-4


def candidate_scale(input_mean: Tensor, ratio: float, weight_mean: Tensor | None = None) -> Tensor:
    """Scale of each input channel for one point of the grid, normalised so that sqrt(max * min) = 1.

    Args:
        input_mean: [K], mean of |x| over the calibration tokens.
        ratio: exponent in [0, 1); 0 is round-to-nearest.
        weight_mean: [K] as of `normalised_weight_mean`; given, AutoAWQ's duo scaling is used.
    """
    if weight_mean is None:
        scale = input_mean.pow(ratio).clamp(min=SMALLEST_SCALE)
    else:
        scale = (input_mean.pow(ratio) / (weight_mean.pow(1 - ratio) + 1e-4)).clamp(min=SMALLEST_SCALE)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return scale.where(scale.isfinite(), torch.ones_like(scale))


def normalised_weight_mean(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """[K]: mean over all rows of |w| relative to the largest of its quantization group (AutoAWQ's duo scaling)."""
    weight = torch.cat(list(weights))
    groups = weight.abs().view(-1, weight.shape[1] if group_size == -1 else group_size)
    return (groups / (groups.amax(dim=1, keepdim=True) + 1e-6)).view_as(weight).mean(dim=0)


def apply_scale(block: nn.Module, prev: str, readers: Sequence[str], scale: Tensor) -> None:
    """Divide the output of `prev` by `scale` and multiply the input columns of `readers` by it, in place.

    A linear `prev` gives up its last `len(scale)` rows, where a fused QKV or gate/up keeps what is read. An activation
    is wrapped in a `ScaledActivation`.

    Raises:
        ValueError: `prev` is neither a norm, a linear nor an activation, or a shape does not fit.
    """
    module: Any = block.get_submodule(prev)
    weights: list[Any] = [block.get_submodule(name).weight for name in readers]
    for name, weight in zip(readers, weights, strict=True):
        if weight.shape[1] != scale.shape[0]:
            raise ValueError(f"{name} reads {weight.shape[1]} channels, its scale has {scale.shape[0]}")
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            divide_last_rows(module.weight, scale)
            if module.bias is not None:
                divide_last_rows(module.bias, scale)
        elif isinstance(module, ScaledActivation):
            module.scales.mul_(scale.to(module.scales))
        elif isinstance(getattr(module, "weight", None), Tensor):
            _scale_norm(prev, module, scale)
        elif list(module.parameters()):
            raise ValueError(f"{prev} is a {type(module).__name__}; accepted are norms, linears and activations")
        else:
            block.set_submodule(prev, ScaledActivation(module, scale.to(weights[0])))
        for weight in weights:
            weight.mul_(scale.to(weight))


def divide_last_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """Divide the last `len(scale)` rows of a weight [N, K] or entries of a bias [N] by `scale`, in place."""
    rows = tensor[-len(scale) :]
    rows.div_(scale.to(tensor).view(-1, *[1] * (tensor.dim() - 1)))
    return tensor


def _scale_norm(name: str, norm: Any, scale: Tensor) -> None:
    offset = weight_offset(name, norm)
    divisor = scale.to(norm.weight)
    norm.weight.copy_((norm.weight + offset) / divisor - offset)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(divisor)


def weight_offset(name: str, norm: Any) -> float:
    """What a norm adds to its stored weight: 0 for most, 1 for Gemma's; found by doubling the weight and looking."""
    probe = torch.linspace(-1, 1, norm.weight.shape[0], device=norm.weight.device, dtype=norm.weight.dtype)[None]
    bias = getattr(norm, "bias", None)
    shift = bias if isinstance(bias, Tensor) else torch.zeros_like(norm.weight)
    kept = norm.weight.detach().clone()
    try:
        response = _responses(norm, probe, shift, kept)
    finally:
        norm.weight.copy_(kept)
    for offset in (0.0, 1.0):
        if torch.allclose(response(1.0 - offset), 2 * response(0.5 - offset), rtol=2e-2, atol=1e-3):
            return offset
    raise ValueError(f"{name}: the output of {type(norm).__name__} is not proportional to its weight or to 1 + weight")


def _responses(norm: Any, probe: Tensor, shift: Tensor, weight: Tensor) -> Callable[[float], Tensor]:
    results = {}
    for value in (1.0, 0.5, 0.0, -0.5):
        norm.weight.copy_(torch.full_like(weight, value))
        results[value] = norm(probe).float() - shift.float()
    return results.__getitem__
