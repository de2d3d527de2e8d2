"""Real-time chunking: a flow policy's new chunk is led to agree with the one that runs.

The field's time runs from 1 (noise) to 0 (actions) and its velocity is noise - actions, as in LeRobot's policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EXP, LINEAR, ONES, ZEROS = "exp", "linear", "ones", "zeros"
SCHEDULES = (EXP, LINEAR, ONES, ZEROS)


def prefix_weights(delay: int, end: int, total: int, schedule: str = EXP) -> Tensor:
    """How much each action of a chunk is to agree with the chunk that runs.

    Args:
        delay: first actions that will have been executed before the chunk is used: weight 1.
        end: actions from which on the weight is 0.
        total: actions of the chunk.
        schedule: between the two, "linear" falls in equal steps, "exp" faster, "ones" stays 1, "zeros" is 0.

    Returns:
        [total], float32, from 1 to 0.

    Raises:
        ValueError: a count is negative or the schedule unknown.

    Source: Real-Time Execution of Action Chunking Flow Policies (arXiv 2506.07339), equation 5; LeRobot's numbers.
    """
    for name, value in (("delay", delay), ("end", end), ("total", total)):
        if value < 0:
            raise ValueError(f"{name}: got {value}, wanted 0 or more")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: got {schedule!r}, accepted are {', '.join(SCHEDULES)}")
    end = min(end, total)
    delay = min(delay, end)
    weights = torch.zeros(total)
    weights[:delay] = 1.0
    if schedule != ZEROS:
        falling = torch.linspace(1, 0, end - delay + 2)[1:-1]
        weights[delay:end] = {
            EXP: falling * torch.expm1(falling) / (math.e - 1), LINEAR: falling, ONES: torch.ones_like(falling),
        }[schedule]  # fmt: skip
    return weights


def guidance_gain(t: float | Tensor, cap: float) -> Tensor:
    """What a correction is multiplied by at a time of the field: much near the noise, where it costs nothing.

    Args:
        t: 1 is noise, 0 actions.
        cap: the most; 5 in the Kinetix experiments of the paper, 10 in LeRobot.

    Returns:
        ((1 - tau) / tau) * ((1 - tau)^2 + tau^2) / (1 - tau)^2 with tau = 1 - t, at most `cap`; `cap` at t = 1 and
        0 at t = 0, where no step is taken.
    """
    noise = torch.as_tensor(t)
    data = 1 - noise
    gain = (noise / data) * ((noise**2 + data**2) / noise**2)
    return torch.nan_to_num(gain, nan=0.0, posinf=cap).clamp(max=cap)


def guided_velocity(
    velocity: Callable[[Tensor], Tensor], x: Tensor, t: float | Tensor, leftover: Tensor | None, delay: int, *,
    execution_end: int | None = None, cap: float = 10.0, full_jacobian: bool = False, schedule: str = EXP,
) -> Tensor:  # fmt: skip
    """The velocity of a field, corrected so that the chunk begins like what runs.

    Args:
        velocity: the field at this time, [..., chunk_size, action_dim] to the same.
        x: [..., chunk_size, action_dim], where the integration is.
        t: time of the field, 1 for noise, 0 for actions; a number, or a tensor that broadcasts with `x`.
        leftover: [..., steps, dims], the running chunk from the observation on; None leaves the field as it is. What
            it lacks in steps or dims is zero.
        delay: steps of `leftover` that will have been executed before the new chunk is used.
        execution_end: from which action on the chunk is free; by default, and at most, as many as `leftover` has.
        cap: the largest gain, of `guidance_gain`.
        full_jacobian: correct through the network's Jacobian, as the paper does, which costs a backward pass; otherwise
            the Jacobian counts as the identity, which is what LeRobot 0.6.1 computes: its velocity is evaluated before
            gradients are on.
        schedule: of `prefix_weights`.

    Returns:
        [..., chunk_size, action_dim], detached.

    Raises:
        ValueError: `leftover` is larger than the chunk, a count is wrong, or gradients are asked for in inference mode.
    """
    if leftover is None:
        with torch.no_grad():
            return velocity(x)
    steps = leftover.shape[-2]
    weights = prefix_weights(
        delay, min(steps if execution_end is None else execution_end, steps), x.shape[-2], schedule
    )
    weights = weights.to(x)[:, None]
    wanted = _widened(leftover, x)

    if full_jacobian:
        field, correction = _through_network(velocity, x, t, wanted, weights)
    else:
        with torch.no_grad():
            field = velocity(x)
            correction = weights * (wanted - (x - t * field))
    return field - guidance_gain(t, cap).to(x) * correction


def _through_network(
    velocity: Callable[[Tensor], Tensor], x: Tensor, t: float | Tensor, wanted: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    if torch.is_inference_mode_enabled():
        raise ValueError("full_jacobian: got True in torch.inference_mode(), which keeps no graph; use torch.no_grad()")
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        field = velocity(start)
        actions = start - t * field
        error = (weights * (wanted - actions)).detach()
        (correction,) = torch.autograd.grad(actions, start, error)
    return field.detach(), correction


def _widened(leftover: Tensor, x: Tensor) -> Tensor:
    steps, dims = leftover.shape[-2:]
    if steps > x.shape[-2] or dims > x.shape[-1]:
        raise ValueError(f"leftover: got {steps} steps of {dims}, wanted at most {x.shape[-2]} of {x.shape[-1]}")
    return torch.nn.functional.pad(leftover.to(x), (0, x.shape[-1] - dims, 0, x.shape[-2] - steps))
