"""What a training will take, from its first steps, done in a folder that is thrown away."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pronghorn.dcae.diffusers.training.loop import CHECKPOINTS, KEPT
from pronghorn.estimate import Estimate, StepClock, folder_bytes, now, peak_bytes

STEPS = {"cpu": 4, "cuda": 20}  # a GPU's are short, and not all of the same length


def rehearse(config: Any, trainer: Callable[[Any, Path], Any]) -> Estimate:
    """Train a few steps, make a checkpoint and evaluate once.

    A discriminator judges from the first step on here.

    Args:
        config: `PhaseConfig` or `DiffusionConfig` of the whole training.
        trainer: makes one of a configuration and a folder.
    """
    steps = min(config.steps, STEPS["cuda" if torch.cuda.is_available() else "cpu"])
    sooner = {name: 0 for name in ("evaluate_every", "discriminator_start") if hasattr(config, name)}
    warmup = min(config.warmup_steps, steps)
    short = dataclasses.replace(config, steps=steps, save_every=steps, warmup_steps=warmup, **sooner)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = trainer(short, folder)
        evaluating = _seconds_of_evaluations(made)
        clock = StepClock(made.device)
        made.fit(clock)
        evaluation = sum(evaluating)  # of the one at the end
        writing = now(made.device) - clock.ended[-1] - evaluation
        checkpoint = folder_bytes(folder / CHECKPOINTS)
        rest = folder_bytes(folder) - checkpoint
    saves = config.steps // config.save_every if config.save_every else 0
    every = getattr(config, "evaluate_every", 0)
    evaluations = 1 + (config.steps // every if every else 0)
    seconds = clock.scaled(config.steps) + evaluations * evaluation
    seconds += writing * (saves * checkpoint + rest) / (checkpoint + rest)
    # The newest is written before the oldest goes.
    disk = rest + checkpoint * min(saves, KEPT + 1)
    return Estimate(peak_bytes(made.device), disk, seconds, f"{steps} of {config.steps} steps")


def _seconds_of_evaluations(trainer: Any) -> list[float]:
    """How long each of a trainer's evaluations takes, from now on; one of a diffusion model has none."""
    seconds: list[float] = []
    evaluate = getattr(trainer, "evaluate", None)
    if evaluate is None:
        return seconds

    def timed() -> Any:
        started = now(trainer.device)
        found = evaluate()
        seconds.append(now(trainer.device) - started)
        return found

    trainer.evaluate = timed
    return seconds
