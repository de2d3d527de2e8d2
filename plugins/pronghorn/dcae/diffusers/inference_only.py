"""Blocks that read weights made of others when they were built: a training would not reach those."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

REMEDY = "its fast form is for inference; call `restore()` of the handle that accelerate_dcae gave"


class InferenceOnly(nn.Module):
    """A module that is never in training mode."""

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode as for any module.

        Raises:
            ValueError: training mode is wanted.
        """
        if mode:
            raise ValueError(f"vae: is to train, but {REMEDY}")
        return super().train(False)

    def refuse_gradients(self) -> None:
        """Raise ValueError if a parameter wants a gradient; an input may."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"vae: its parameters want gradients, but {REMEDY}")
