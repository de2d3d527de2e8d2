"""TRL's asynchronous trainer on devices other than GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.experimental.async_grpo import async_grpo_trainer


@contextmanager
def any_device(device: torch.device) -> Iterator[None]:
    """Within this, an `AsyncGRPOTrainer` can be made for the device.

    TRL 1.16 asks CUDA for the device's name, to look up its peak of FLOPs, and fails where it is a CPU. Devices that it
    does not know have no peak.
    """
    look_up = async_grpo_trainer.get_peak_flops_per_device
    if device.type != "cuda":
        async_grpo_trainer.get_peak_flops_per_device = lambda accelerator, dtype: None
    try:
        yield
    finally:
        async_grpo_trainer.get_peak_flops_per_device = look_up
