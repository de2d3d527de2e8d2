"""A control loop at 30 Hz on the wall clock, with a policy that takes 100 ms: synchronous against VLASH.

The robot goes to goals in a plane and is to follow a target on a circle, which jumps now and then. Reactions are
measured for events at random moments, as any jump is one. The policy plans from what it is given, then sleeps, as one
on a GPU leaves the processor free.
"""

from __future__ import annotations

import argparse
import bisect
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import AUTO, SYNC, VLASH, VLASHSettings
from pronghorn.vlash.control import ControlRecord, control_loop
from pronghorn.vlash.metrics import paper_reaction_latency, reaction_latencies
from pronghorn.vlash.runner import AsyncRunner, RunnerStatistics

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "vlash_realtime.png"
FPS, LATENCY, SECONDS = 30.0, 0.1, 20.0
CHUNK = 32
ROUND = 4.0  # seconds of the target's way round its circle, whose radius is 1
JUMP_SECONDS = 0.5  # between the target's jumps, on average
MOMENTS = 400  # of a run, whose reactions are measured
GAIN = 0.3  # of the way to the target, in an action


@dataclass(frozen=True)
class Case:
    """What is run: K, the overlap d of VLASH, and q."""

    n_action_steps: int
    overlap: int | str = 4
    ratio: int = 1

    def settings(self, async_mode: str) -> VLASHSettings:
        """Of this case; `sync` has no overlap."""
        return VLASHSettings(
            async_mode=async_mode, chunk_size=CHUNK, n_action_steps=self.n_action_steps, fps=FPS,
            inference_overlap_steps=0 if async_mode == SYNC else self.overlap, action_quant_ratio=self.ratio,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"K={self.n_action_steps} d={self.overlap} q={self.ratio}"


LONG, SHORT = Case(25), Case(4)
CASES = (LONG, Case(25, AUTO), Case(15), Case(15, AUTO), Case(24, 4, 2), SHORT, Case(4, AUTO))


@dataclass(frozen=True)
class Run:
    """What was measured in one run.

    Attributes:
        settings: of the run.
        record: of the control loop.
        statistics: of the runner.
        reactions: seconds, of `MOMENTS` events at random.
    """

    settings: VLASHSettings
    record: ControlRecord
    statistics: RunnerStatistics
    reactions: list[float]

    @property
    def stalls(self) -> int:
        """After the start, which has to wait."""
        return self.record.stalls - 1

    @property
    def actions_per_second(self) -> float:
        """Of the policy; `action_quant_ratio` of them are one command."""
        steps = len(self.record.times) - 1
        return steps * self.settings.action_quant_ratio / (self.record.times[-1] - self.record.times[0])


class Target:
    """Goes round its circle, and jumps by up to half a round at random moments."""

    def __init__(self, seconds: float, seed: int) -> None:
        generator = random.Random(seed)
        self._moments = sorted(generator.uniform(0, seconds) for _ in range(round(seconds / JUMP_SECONDS)))
        self._jumps = [0.0]
        for _ in self._moments:
            self._jumps.append(self._jumps[-1] + generator.uniform(-math.pi, math.pi))

    def angle(self, seconds: float) -> float:
        """Where it is, radians."""
        return 2 * math.pi * seconds / ROUND + self._jumps[bisect.bisect(self._moments, seconds)]


class Planner:
    """Leads the robot, from the state it is given, to where the target will be if it does not jump.

    Args:
        latency: seconds that it takes.
        ratio: actions in a control period.
    """

    def __init__(self, latency: float, ratio: int) -> None:
        self._latency, self._turn = latency, 2 * math.pi / (ROUND * FPS * ratio)

    def __call__(self, request: ChunkRequest) -> Tensor:
        """[CHUNK, 2], goals."""
        ready = time.monotonic() + self._latency
        state, goals = request.state, []
        for step in range(request.delay + 1, request.delay + 1 + CHUNK):
            angle = torch.as_tensor(request.observation.content + step * self._turn)
            state = state + GAIN * (torch.stack([angle.cos(), angle.sin()]) - state)
            goals.append(state)
        time.sleep(max(ready - time.monotonic(), 0))
        return torch.stack(goals)


def run(case: Case, async_mode: str, *, seconds: float = SECONDS, latency: float = LATENCY, seed: int = 0) -> Run:
    """One run, in real time."""
    settings, target = case.settings(async_mode), Target(seconds, seed)
    place = torch.zeros(2)
    start = time.monotonic()

    def observe() -> Observation:
        return Observation(target.angle(time.monotonic() - start), place)

    def act(goal: Tensor) -> None:
        nonlocal place
        place = goal

    with AsyncRunner(Planner(latency, case.ratio), settings) as runner:
        start = time.monotonic()
        record = control_loop(runner, observe, act, FPS, round(seconds * FPS))
        statistics = runner.statistics()
    # To an event that is later than the last observation nothing reacts any more, which the mean would not see.
    generator, last = random.Random(seed), max(record.observed)
    moments = [generator.uniform(0, last) for _ in range(MOMENTS)]
    return Run(settings, record, statistics, reaction_latencies(moments, record.times, record.observed))


def _spread(values: Sequence[float]) -> dict[str, float]:
    from harness import median

    return median(list(values))


def results(case: Case, vlash: Run, sync: Run) -> list[dict[str, Any]]:
    """For `harness.write`."""
    from harness import row

    ours, theirs = vlash.record, sync.record
    note = (
        f"vlash: overlap {vlash.statistics.overlap} actions, {ours.overruns} overruns; sync: {theirs.overruns} overruns"
    )
    found = []

    def add(
        what: str, mine: Sequence[float], other: Sequence[float], unit: str, better: bool = False, more: str = ""
    ) -> None:
        found.append(
            row(f"{what}, vlash", "sync", str(case), _spread(mine), _spread(other), unit=unit,
                higher_is_better=better, note=more or note)
        )  # fmt: skip

    add("stalls after the start", [vlash.stalls], [sync.stalls], "count")
    add("late commands", [ours.late_ticks], [theirs.late_ticks], "count")
    add("actions per second", [vlash.actions_per_second], [sync.actions_per_second], "1/s", True)
    add("reaction, measured", vlash.reactions, sync.reactions, "s", more=f"{MOMENTS} events at random moments")
    add("mean reaction, measured", [fmean(vlash.reactions)], [fmean(sync.reactions)], "s")
    add("reaction, 95 % of events", [_p95(vlash)], [_p95(sync)], "s")
    add(
        "reaction by the paper's formula", [paper_reaction_latency(vlash.settings, LATENCY)],
        [paper_reaction_latency(sync.settings, LATENCY)], "s",
        more="not measured: takes an event just after sync has asked, but just before VLASH asks",
    )  # fmt: skip
    mine, other = ours.metrics(), theirs.metrics()
    if mine.boundary_jump is not None and other.boundary_jump is not None:
        add("boundary jump", [mine.boundary_jump], [other.boundary_jump], "radius")
    if mine.jerk is not None and other.jerk is not None:
        add("jerk", [mine.jerk], [other.jerk], "radius/s³", more="over commands, as if they were evenly spaced")
    return found


def _p95(of: Run) -> float:
    from pronghorn.vlash.latency import percentile

    found = percentile(of.reactions, 95)
    return math.nan if found is None else found


def main() -> None:
    """Run all, write the results, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found, synchronous, drawn = [], {}, {}
    for case in CASES:
        key = case.n_action_steps, case.ratio
        if key not in synchronous:
            synchronous[key] = run(case, SYNC, seconds=asked.seconds)
        drawn[case] = run(case, VLASH, seconds=asked.seconds)
        found += results(case, drawn[case], synchronous[key])
    from harness import row, write

    # What the other rows, each of one K, do not show: only who need not wait for a chunk can ask for one so often.
    short, long = drawn[SHORT], synchronous[LONG.n_action_steps, LONG.ratio]
    found.append(
        row("reaction, measured, vlash", f"sync, {LONG}", str(SHORT), _spread(short.reactions), _spread(long.reactions),
            unit="s", note="asked for again as soon as one begins; sync would stand still for half of the time")
    )  # fmt: skip

    write("vlash_realtime", found)
    draw(drawn, synchronous)


def draw(vlash: dict[Case, Run], sync: dict[tuple[int, int], Run]) -> None:
    """When commands came, and how long reactions took."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
    runs = {"sync": sync[LONG.n_action_steps, LONG.ratio], f"VLASH, d={LONG.overlap}": vlash[LONG]}
    for number, (name, each) in enumerate(runs.items()):
        shown = [moment for moment in each.record.times if moment < 3]
        above.plot(shown, [number] * len(shown), f"C{number}|", ms=14)
        below.ecdf(each.reactions, label=f"{name}, K={LONG.n_action_steps}", color=f"C{number}")
    below.ecdf(vlash[SHORT].reactions, label=f"VLASH, d={SHORT.overlap}, K={SHORT.n_action_steps}", color="C2")
    below.ecdf(sync[SHORT.n_action_steps, SHORT.ratio].reactions, label=f"sync, K={SHORT.n_action_steps}", color="C3")
    above.set(yticks=range(len(runs)), yticklabels=list(runs), xlabel="seconds", ylim=(-0.5, 1.5))
    above.set_title(f"Commands at {FPS:.0f} Hz, a policy that takes {LATENCY * 1000:.0f} ms, K={LONG.n_action_steps}")
    below.set(xlabel="seconds from a random event to the first command that knows of it", ylabel="share of events")
    below.grid(alpha=0.3)
    below.legend()
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
