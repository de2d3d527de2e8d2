"""Policies, executors and clocks that do what a test says."""

import threading
from functools import partial

import torch

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.manager import RollForwardManager


class CountingPolicy:
    """Call c (from 0) gives action j of value 100 (c + 1) + j in every coordinate; keeps what it was asked."""

    def __init__(self, chunk_size, action_dim=1, batch=()):
        self.chunk_size, self.action_dim, self.batch = chunk_size, action_dim, batch
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        column = 100.0 * len(self.requests) + torch.arange(self.chunk_size, dtype=torch.float32)
        return column[:, None].expand(*self.batch, self.chunk_size, self.action_dim).clone()


class SlowPolicy(CountingPolicy):
    """Waits to be allowed before it gives a chunk, from its second call on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.allowed, self.begun = threading.Event(), threading.Event()

    def __call__(self, request):
        chunk = super().__call__(request)
        if len(self.requests) > 1:
            self.begun.set()
            assert self.allowed.wait(10)
        return chunk


class LateExecutor:
    """Every chunk but the first is there only when asked about it for the (late + 1)-th time."""

    def __init__(self, late):
        self.late, self.submitted, self.cancelled = late, 0, 0

    def submit(self, compute):
        self.submitted += 1
        return _LatePending(compute(), self)


class _LatePending:
    def __init__(self, chunk, executor):
        self.chunk, self.left, self.executor = chunk, executor.late, executor
        self.seconds = 0.25

    def done(self):
        self.left -= 1
        return self.left < 0

    def result(self):
        return self.chunk

    def cancel(self):
        self.executor.cancelled += 1


class FakeClock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def run(settings, policy, ticks, *, state_dim=1, batch=(), manager=None, **arguments):
    """The ticks of a manager whose observation's content and state are the tick's number."""
    manager = manager or RollForwardManager(settings, policy, **arguments)
    return [
        manager.tick(partial(Observation, number, torch.full((*batch, state_dim), float(number))))
        for number in range(ticks)
    ]


def values(ticks):
    """The first coordinate of each action."""
    return [tick.action.flatten()[0].item() for tick in ticks]
