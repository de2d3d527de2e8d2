"""What a training will take, from its first steps, done in a folder that is thrown away."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pronghorn.dcae.diffusers.training.loop import CHECKPOINTS, KEPT
from pronghorn.estimate import Estimate, StepClock, folder_bytes, peak_bytes

STEPS = 4


def rehearse(config: Any, trainer: Callable[[Any, Path], Any]) -> Estimate:
    """Train a few steps and make a checkpoint.

    Of the time, evaluations and checkpoints are not counted. A discriminator judges from the first step on here.

    Args:
        config: `PhaseConfig` or `DiffusionConfig` of the whole training.
        trainer: makes one of a configuration and a folder.
    """
    steps = min(config.steps, STEPS)
    sooner = {name: 0 for name in ("evaluate_every", "discriminator_start") if hasattr(config, name)}
    warmup = min(config.warmup_steps, steps)
    short = dataclasses.replace(config, steps=steps, save_every=steps, warmup_steps=warmup, **sooner)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = trainer(short, folder)
        clock = StepClock(made.device)
        made.fit(clock)
        checkpoint = folder_bytes(folder / CHECKPOINTS)
        rest = folder_bytes(folder) - checkpoint
    count = config.steps // config.save_every if config.save_every else 0
    # The newest is written before the oldest goes.
    disk = rest + checkpoint * min(count, KEPT + 1)
    return Estimate(peak_bytes(made.device), disk, clock.scaled(config.steps), f"{steps} of {config.steps} steps")
