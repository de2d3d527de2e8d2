"""Weights that are numbers: looked at before any work."""

from __future__ import annotations

from torch import nn


def check_weights(model: nn.Module) -> None:
    """Raise ValueError, with its name, where a parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name}: holds NaN or Inf")
