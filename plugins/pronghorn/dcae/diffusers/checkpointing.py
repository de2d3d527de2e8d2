"""Stages that keep what goes into each block and compute the rest once more when gradients are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # of which synchronized ones are, too


class CheckpointedStage(nn.Sequential):
    """Blocks of a stage; diffusers' `enable_gradient_checkpointing` turns it on."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # diffusers sets it

    def forward(self, x: Tensor) -> Tensor:
        """The blocks one after the other."""
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(_Twice(block), x)
            else:
                x = block(x)
        return x


class _Twice:
    """A block that is run a second time for its gradients: batch norms have seen the images by then."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.ran = block, False

    def __call__(self, x: Tensor) -> Tensor:
        with _statistics_kept(self.block) if self.ran else nullcontext():
            self.ran = True
            y: Tensor = self.block(x)
            return y


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the new statistics count nothing
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
