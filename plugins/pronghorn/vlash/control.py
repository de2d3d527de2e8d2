"""A control loop in real time, and a record of what it did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import AUTO
from pronghorn.vlash.latency import percentile
from pronghorn.vlash.metrics import ControlMetrics, boundary_jump, jerk, reaction_latencies, typical_step
from pronghorn.vlash.runner import AsyncRunner


class Clock(Protocol):
    """Seconds that never run back, and sleep; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
        ...


@dataclass
class ControlRecord:
    """What a control loop did, command by command.

    Attributes:
        fps: commands per second that were wanted.
        actions: each [..., action_dim].
        times: seconds, when each was given, from the loop's start.
        observed: seconds, when the observation was read that its chunk was computed from; minus infinity if that was
            before the loop.
        chunks: the number of the chunk that it is of.
        overruns: commands that came over half a period after they were due, after which the schedule began anew.
        stalls: chunks that were waited for because nothing ran.
        stall_seconds: how long.
        late_ticks: actions that stood in for a late chunk's.
    """

    fps: float
    actions: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    overruns: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    late_ticks: int = 0

    @property
    def boundaries(self) -> list[int]:
        """The commands that begin a chunk, save the first command of all."""
        return [step for step in range(1, len(self.chunks)) if self.chunks[step] != self.chunks[step - 1]]

    def metrics(self, events: Sequence[float] | None = None) -> ControlMetrics:
        """In short.

        Args:
            events: seconds from the loop's start at which something happened that a reaction is measured to; by default
                one with every command, for an event that is as likely at any time.
        """
        actions = torch.stack(self.actions)
        reactions = reaction_latencies(self.times if events is None else events, self.times, self.observed)
        return ControlMetrics(
            steps=len(actions), stalls=self.stalls, stall_seconds=self.stall_seconds, late_ticks=self.late_ticks,
            reaction_mean=fmean(reactions) if reactions else None, reaction_p95=percentile(reactions, 95),
            boundary_jump=boundary_jump(actions, self.boundaries),
            typical_step=typical_step(actions, self.boundaries), jerk=jerk(actions, self.fps),
        )  # fmt: skip


def control_loop(
    runner: AsyncRunner,
    observe: Callable[[], Observation],
    act: Callable[[Tensor], object],
    fps: float,
    steps: int,
    clock: Clock = time,
) -> ControlRecord:
    """Give one command every 1 / `fps` seconds.

    Commands are due at fixed times, so that small delays do not add up. One that comes over half a period late begins
    the schedule anew: a robot is never hurried to make up for a stall.

    Args:
        runner: gives the commands.
        observe: reads cameras and state; called only when the runner needs it.
        act: hands a command, [..., action_dim], to the robot.
        fps: commands per second.
        steps: commands.
        clock: for a loop in simulated time.

    Raises:
        ValueError: `fps` is not positive, or another than the runner plans for where it chooses its overlap itself, or
            `steps` is not at least 1.
        VLASHError: as of `AsyncRunner.step`; the record so far is lost, the robot keeps its last command.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: got {fps}, wanted a positive number")
    settings = runner.manager.settings
    if settings.inference_overlap_steps == AUTO and not math.isclose(settings.fps, fps, rel_tol=0.01):
        raise ValueError(
            f"fps: got {fps}, but the runner's settings have fps={settings.fps:g}, by which inference_overlap_steps="
            f"{AUTO!r} is chosen; wanted the same in both"
        )
    if steps < 1:
        raise ValueError(f"steps: got {steps}, wanted at least 1")
    record, counts = ControlRecord(fps), runner.statistics()
    start = due = clock.monotonic()
    read: list[float] = []

    def look() -> Observation:
        read.append(clock.monotonic() - start)
        return observe()

    for _ in range(steps):
        clock.sleep(max(due - clock.monotonic(), 0))
        tick = runner.tick(look)
        now = clock.monotonic()
        act(tick.action)
        number = tick.observation - counts.observations
        record.actions.append(tick.action)
        record.times.append(now - start)
        record.observed.append(read[number] if number >= 0 else -math.inf)
        record.chunks.append(tick.chunk)
        late = now - due > 0.5 / fps
        record.overruns += late
        due = (now if late else due) + 1 / fps
    since = runner.statistics()
    record.stalls = since.stalls - counts.stalls
    record.stall_seconds = since.stall_seconds - counts.stall_seconds
    record.late_ticks = since.late_ticks - counts.late_ticks
    return record
