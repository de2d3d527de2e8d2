"""By what norm layers multiply their weights: PyTorch's own, and the RMS norm that transformers has for each model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OF_PYTORCH = (nn.LayerNorm, nn.RMSNorm)


class NormSlopes:
    """The derivative of what a norm layer gives by its weight.

    Args:
        layers: those of them that are RMS norms of a model's own are looked at, one of each kind, for that waits for
            the device.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        kinds = {layer: _kind(layer) for layer in layers if is_own_rms_norm(layer)}
        found: dict[Any, float | None] = {}
        for layer, kind in kinds.items():
            if kind not in found:
                found[kind] = _eps(layer)
        self._eps = {layer: eps for layer, kind in kinds.items() if (eps := found[kind]) is not None}
        self._scales = {layer for layer in kinds if layer not in self._eps and _scales(layer)}

    def __call__(self, layer: Any, seen: Tensor) -> Tensor:
        """In the shape and dtype of what a layer saw: for each row that it normalises."""
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(seen, layer.normalized_shape, eps=layer.eps)
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(seen, layer.normalized_shape, eps=layer.eps)
        if layer in self._eps:
            return F.rms_norm(seen, seen.shape[-1:], eps=self._eps[layer])
        # What a norm layer gives is affine in its weight, with the normalised input as the slope.
        slope = _with_weight(layer, seen, 1.0)
        return slope if layer in self._scales else slope - _with_weight(layer, seen, 0.0)


def is_own_rms_norm(module: nn.Module) -> bool:
    """Whether it is one of transformers', which has one for each model."""
    return type(module).__name__.endswith("RMSNorm") and not isinstance(module, OF_PYTORCH)


def _kind(module: nn.Module) -> Any:
    """What tells norm layers apart that may compute differently: the class, the width and all settings."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    return type(module), module.get_parameter("weight").shape, tuple(sorted(settings.items()))


def _eps(module: nn.Module) -> float | None:
    """Of a norm layer that normalises as PyTorch's own function does, and then multiplies; None of another one."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    weight = module.get_parameter("weight")
    # Rows so small that eps counts, and large ones.
    probe = torch.linspace(-1, 2, 2 * weight.numel(), device=weight.device).reshape(2, -1) * weight.new_tensor(
        [[eps**0.5], [1.0]], dtype=torch.float32
    )
    slope = _with_weight(module, probe, 1.0) - (0 if _scales(module) else _with_weight(module, probe, 0.0))
    return eps if torch.allclose(slope, F.rms_norm(probe, probe.shape[-1:], eps=eps), rtol=1e-5, atol=1e-6) else None


def _scales(module: nn.Module) -> bool:
    """Whether a norm layer gives zeros where its weight is zero: then what it gives with ones is the slope."""
    weight = module.get_parameter("weight")
    return not _with_weight(module, torch.ones(1, weight.numel(), device=weight.device), 0.0).any()


@torch.no_grad()
def _with_weight(module: nn.Module, seen: Tensor, value: float) -> Tensor:
    """What it gives with another weight; it is not called, for what hooks do, as FSDP's, is for its own."""
    own = module.get_parameter("weight")
    weight = torch.full((seen.shape[-1],), value, dtype=seen.dtype, device=seen.device)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    try:
        result: Tensor = module.forward(seen)
    finally:
        module.register_parameter("weight", own)
    return result
