"""Flow matching as pi0 and pi0.5 train and sample it: time runs from 1, which is noise, to 0, which is actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALPHA, SPAN, EARLIEST = 1.5, 0.999, 0.001
MEAN, NONE = "mean", "none"

Velocity = Callable[[Tensor, float], Tensor]
"""The field: at [..., chunk_size, action_dim] and a time, the change per unit of time."""
Guide = Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]
"""Gives a velocity from the field at a time, the place, and that time; `guidance.guided_velocity` is one."""


def sample_times(
    shape: Sequence[int], device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Times to train at: Beta(1.5, 1), stretched to 0.001 ... 1, so that noise is seen more often than actions.

    Returns:
        float32 [*shape].

    Source: pi0 (arXiv 2410.24164), appendix B.
    """
    uniform = torch.rand(tuple(shape), device=device, generator=generator)
    # The distribution function of Beta(a, 1) is x^a.
    return uniform.pow(1 / ALPHA) * SPAN + EARLIEST


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """t noise + (1 - t) actions.

    Args:
        actions: [..., chunk_size, action_dim].
        noise: likewise.
        time: [...].

    Raises:
        ValueError: shapes do not fit each other.
    """
    if noise.shape != actions.shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, wanted that of actions, {tuple(actions.shape)}")
    if time.shape != actions.shape[:-2]:
        raise ValueError(f"time: got shape {tuple(time.shape)}, wanted {tuple(actions.shape[:-2])}")
    t = time[..., None, None]
    return t * noise + (1 - t) * actions


def target(actions: Tensor, noise: Tensor) -> Tensor:
    """The velocity to learn, noise - actions, which is the same at all times."""
    return noise - actions


def reduce_loss(
    elements: Tensor, is_pad: Tensor | None = None, offset_mask: Tensor | None = None, *,
    action_dim: int | None = None, exclude_padding: bool = False, reduction: str = MEAN,
) -> Tensor:  # fmt: skip
    """The mean of squared errors.

    Args:
        elements: [batch, H, width], or [batch, N, H, width] with branches.
        is_pad: bool [batch, (N,) H], steps after the episode's end; they count as no error.
        offset_mask: bool [batch, N], False for branches that are padding; they do not count at all.
        action_dim: how many of the `width` coordinates are the robot's; None counts all, padding included, which is
            what the authors train.
        exclude_padding: leave steps after the end out of the mean, where the authors count them as zeros.
        reduction: "mean" over everything, or "none" for one mean of each sample.

    Returns:
        A scalar, or [batch].

    Raises:
        ValueError: a shape does not fit or a choice is unknown.
    """
    if reduction not in (MEAN, NONE):
        raise ValueError(f"reduction: got {reduction!r}, accepted are {MEAN}, {NONE}")
    for name, mask, shape in (
        ("is_pad", is_pad, elements.shape[:-1]),
        ("offset_mask", offset_mask, elements.shape[:2]),
    ):
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(mask.shape)}, wanted {tuple(shape)}")
    elements = elements[..., :action_dim]
    counted = torch.ones_like(elements[..., :1])
    if offset_mask is not None:
        counted = counted * offset_mask[..., None, None]
    real = counted if is_pad is None else counted * ~is_pad[..., None]
    weights = (real if exclude_padding else counted).expand_as(elements)
    errors = torch.where(real.bool(), elements, 0)
    if reduction == NONE:
        return errors.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)
    return errors.sum() / weights.sum().clamp(min=1)


def euler_times(steps: int) -> list[float]:
    """Where an integration in `steps` equal steps evaluates the field: 1, 1 - 1/steps, ..., 1/steps.

    Raises:
        ValueError: there is no step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, wanted at least 1")
    change = -1.0 / steps
    return [1.0 + step * change for step in range(steps)]


def integrate(velocity: Velocity, noise: Tensor, steps: int, guide: Guide | None = None) -> Tensor:
    """Euler's method from noise to actions.

    Args:
        velocity: the field.
        noise: [..., chunk_size, action_dim], where it starts.
        steps: how many, of equal length.
        guide: changes the velocity on the way.

    Returns:
        Actions, of the shape of `noise`.

    Raises:
        ValueError: there is no step.
    """
    x = noise
    for time in euler_times(steps):
        change = velocity(x, time) if guide is None else guide(_at(velocity, time), x, time)
        x = x + (-1.0 / steps) * change
    return x


def _at(velocity: Velocity, time: float) -> Callable[[Tensor], Tensor]:
    return lambda place: velocity(place, time)
