"""What a controlled run was like: how often it stood still, how soon it reacted, how smooth it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash.config import SYNC, VLASHSettings


@dataclass(frozen=True)
class ControlMetrics:
    """Of one run.

    Attributes:
        steps: commands.
        stalls: chunks that the robot stood still for, the first one included.
        stall_seconds: how long.
        late_ticks: actions that stood in for a late chunk's.
        reaction_mean: seconds from an event until the first command that knows of it; None if none did.
        reaction_p95: what 95 % of the events do not exceed.
        boundary_jump: mean distance from the last action of a chunk to the first of the next; None without a boundary.
        typical_step: mean distance of actions that follow each other within a chunk; None where there are none.
        jerk: root mean square of the actions' third derivative, per second³; None with fewer than 4 actions.
    """

    steps: int
    stalls: int
    stall_seconds: float
    late_ticks: int
    reaction_mean: float | None
    reaction_p95: float | None
    boundary_jump: float | None
    typical_step: float | None
    jerk: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def boundary_jump(actions: Tensor, boundaries: Sequence[int]) -> float | None:
    """Mean Euclidean distance from the last action of a chunk to the first of the next.

    Args:
        actions: [steps, ..., action_dim], goals as the robot got them.
        boundaries: the steps at which a chunk begins; step 0 has nothing before it and does not count.

    Returns:
        In the actions' unit; None if there is no such step.

    Raises:
        ValueError: a boundary is no step.
    """
    inner, at = _distances(actions), _at_boundary(actions, boundaries)
    return float(inner[at].mean()) if at.any() else None


def typical_step(actions: Tensor, boundaries: Sequence[int]) -> float | None:
    """The same for all other actions that follow each other: what a boundary's jump is to be held against."""
    inner, at = _distances(actions), _at_boundary(actions, boundaries)
    return None if at.all() else float(inner[~at].mean())


def jerk(actions: Tensor, fps: float) -> float | None:
    """Root mean square of the third difference's length, times fps³.

    Args:
        actions: [steps, ..., action_dim], goals, evenly spaced in time.
        fps: actions per second.

    Returns:
        In the actions' unit per second³; None with fewer than 4 actions.
    """
    if len(actions) < 4:
        return None
    third = actions.double().diff(n=3, dim=0) * fps**3
    return float(third.square().sum(-1).mean().sqrt())


def reaction_latencies(events: Sequence[float], commands: Sequence[float], observed: Sequence[float]) -> list[float]:
    """Seconds from each event until the first command that was computed from an observation not older than it.

    Args:
        events: when something happened, seconds.
        commands: when each command was given, ascending.
        observed: for each command, when the observation that its chunk was computed from was read.

    Returns:
        One an event; events that no command answered any more are left out.

    Raises:
        ValueError: `commands` and `observed` differ in length.
    """
    if len(commands) != len(observed):
        raise ValueError(f"observed: got {len(observed)} times, wanted one a command, {len(commands)}")
    pairs = list(zip(commands, observed, strict=True))
    answers = (next((at - event for at, seen in pairs if seen >= event and at >= event), None) for event in events)
    return [seconds for seconds in answers if seconds is not None]


def paper_reaction_latency(settings: VLASHSettings, latency: float) -> float:
    """The reaction latency by the paper's formula, in seconds: the policy's latency, and for `sync` a whole chunk more.

    It takes an event just after a synchronous chunk began, but just before an asynchronous one is asked for;
    `reaction_latencies` treats both alike.

    Args:
        settings: its `async_mode`, `n_action_steps`, `action_quant_ratio` and `fps`.
        latency: of the policy, seconds.
    """
    chunk = settings.n_action_steps / (settings.action_quant_ratio * settings.fps)
    return latency + chunk if settings.async_mode == SYNC else latency


def _distances(actions: Tensor) -> Tensor:
    """[steps - 1]: from each action to the next, mean over a batch."""
    lengths = actions.double().diff(dim=0).norm(dim=-1)
    return lengths.flatten(1).mean(1) if lengths.dim() > 1 else lengths


def _at_boundary(actions: Tensor, boundaries: Sequence[int]) -> Tensor:
    """[steps - 1]: whether the later action begins a chunk."""
    steps = len(actions)
    if any(not 0 <= step < steps for step in boundaries):
        raise ValueError(f"boundaries: got {list(boundaries)}, wanted steps from 0 to {steps - 1}")
    begins = torch.zeros(steps, dtype=torch.bool, device=actions.device)
    begins[list(boundaries)] = True
    return begins[1:]
