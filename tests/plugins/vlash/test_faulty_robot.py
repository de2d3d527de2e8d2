"""Ten thousand control periods of a robot whose camera, clock and policy misbehave, in simulated time."""

import random

import pytest
import torch
from tests.plugins.vlash.stubs import FakeClock

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.manager import RollForwardManager
from pronghorn.vlash.watchdog import VLASHError

PERIOD, STEPS = 1 / 30, 10_000
FAULTS = (
    "late", "dropped", "doubled", "out of order", "nan", "slow", "nan chunk", "out of range", "clock ahead",
    "clock back",
)  # fmt: skip


class Time(FakeClock):
    """`now` is what programs read, and may be set; `true` only passes."""

    true = 0.0

    def sleep(self, seconds):
        self.now += seconds
        self.true += seconds


class Injector:
    """Says when a fault happens, and counts what it said."""

    def __init__(self, share):
        self.random, self.share, self.fired = random.Random(0), share, dict.fromkeys(FAULTS, 0)  # noqa: S311

    def __call__(self, fault):
        happens = self.random.random() < self.share
        self.fired[fault] += happens
        return happens


class Robot:
    """Its state is its last command; what is read of it may be wrong."""

    def __init__(self, time, faults):
        self.time, self.faults = time, faults
        self.state, self.seen = torch.zeros(2), []

    def observe(self):
        faults = self.faults
        if faults("late"):
            self.time.sleep(0.9 * PERIOD)
        if faults("dropped"):
            raise OSError("no frame")
        if self.seen and faults("doubled"):
            return self.seen[-1]
        if len(self.seen) > 5 and faults("out of order"):
            return self.seen[-5]
        state = torch.full((2,), torch.nan) if faults("nan") else self.state.clone()
        self.seen = [*self.seen[-9:], Observation(None, state)]
        return self.seen[-1]


class Policy:
    """Goes on from what was seen, to and fro within the limits."""

    def __init__(self, faults):
        self.faults = faults

    def __call__(self, request):
        ramp = torch.sin(torch.arange(24.0))[:, None] * 0.1
        goals = 0.9 * request.observation.state + ramp
        if self.faults("nan chunk"):
            goals[3] = torch.nan
        return goals * 1000 if self.faults("out of range") else goals


class Beside:
    """A thread in simulated time: a chunk takes three periods, or far more than it lasts; errors come with it."""

    def __init__(self, time, faults):
        self.time, self.faults, self.free = time, faults, 0.0

    def submit(self, compute):
        seconds = (40 if self.faults("slow") else 2.9) * PERIOD
        self.free = max(self.free, self.time.true) + seconds
        return Chunk(self.time, self.free, seconds, compute)


class Chunk:
    def __init__(self, time, ready, seconds, compute):
        self.time, self.ready, self.seconds, self.compute = time, ready, seconds, compute

    def done(self):
        return self.time.true >= self.ready

    def result(self):
        self.time.sleep(max(self.ready - self.time.true, 0))
        return self.compute()

    def cancel(self):
        """Nobody wants it; the thread is busy all the same."""


def controlled(settings, share):
    """A loop that holds the last command over every error, and starts anew; what came of it."""
    time, faults = Time(), Injector(share)
    robot, errors, undeclared, sent = Robot(time, faults), {}, 0.0, []
    manager = RollForwardManager(settings, Policy(faults), executor=Beside(time, faults), clock=time)
    due = 0.0
    for _ in range(STEPS):
        time.sleep(max(due - time.true, 0))
        if faults("clock ahead"):
            time.now += 5
        if faults("clock back"):
            time.now -= 5
        stalls, held = manager.counts.stalls, False
        try:
            robot.state = manager.tick(robot.observe).action
        except (VLASHError, OSError) as error:
            errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
            held = True
            if isinstance(error, VLASHError):
                manager.reset()
        sent.append(robot.state)
        late = time.true - due
        if not held and manager.counts.stalls == stalls:
            undeclared = max(undeclared, late)
        due = (time.true if late > PERIOD / 2 else due) + PERIOD
    return torch.stack(sent), undeclared / PERIOD, errors, faults.fired, manager.counts


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    "how",
    [
        {"async_mode": "vlash", "late_chunk": "hold"},
        {"async_mode": "vlash", "late_chunk": "continue", "inference_overlap_steps": "auto"},
        {"async_mode": "rtc", "late_chunk": "continue"},
    ],
    ids=lambda how: f"{how['async_mode']}, {how['late_chunk']}",
)
def test_whatever_happens_every_period_has_a_command_within_limits(how, figure):
    how = {"inference_overlap_steps": 4, **how}
    settings = VLASHSettings(
        chunk_size=24, n_action_steps=16, action_low=[-1.0, -0.5], action_high=[1.0, 0.5], fps=30, **how
    )
    sent, undeclared, errors, fired, counts = controlled(settings, 0.0)
    assert (sum(fired.values()), errors, counts.late_ticks, counts.stalls) == (0, {}, 0, 1)
    assert undeclared < 1e-6

    sent, undeclared, errors, fired, counts = controlled(settings, 0.03)
    assert all(count > 5 for count in fired.values()), fired
    assert len(sent) == STEPS
    assert sent.isfinite().all()
    assert (sent.abs() <= torch.tensor([1.0, 0.5])).all()
    assert undeclared <= 1
    assert errors.keys() == {"OSError", "InvalidStateError", "InvalidChunkError", "StaleCommandError"}
    assert counts.late_ticks > 0
    assert counts.stall_seconds >= 0
    figure("control periods", len(sent))
    figure("faults injected", sum(fired.values()))
    figure("longest wait without a declared hold, in periods", round(undeclared, 3))
    figure("commands that were NaN or out of range", int((~(sent.abs() <= torch.tensor([1.0, 0.5]))).sum()))
