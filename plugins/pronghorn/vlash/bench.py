"""How long a policy takes for a chunk, and where in it the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from pronghorn.vlash.latency import overlap_for, percentile

MARK = "vlash: "  # tells our ranges from those of others in a recording


@dataclass(frozen=True)
class Latency:
    """Of a policy, from the call until the chunk is there.

    Attributes:
        seconds: of each timed call.
    """

    seconds: list[float]

    @property
    def mean(self) -> float:
        """Seconds."""
        return fmean(self.seconds)

    def percentile(self, percent: float) -> float:
        """The least latency that `percent` of the calls do not exceed, seconds.

        Raises:
            ValueError: `percent` is not above 0 and at most 100, or there is no call.
        """
        found = percentile(self.seconds, percent)
        if found is None:
            raise ValueError("seconds: got none, wanted those of at least one call")
        return found

    def overlap(self, fps: float, n_action_steps: int) -> int | None:
        """Control steps ahead at which a chunk is to be asked for, so that 95 % are there in time.

        None where 95 % take longer than a chunk is executed: then the robot waits, however early it asks.
        """
        seconds = self.percentile(95)
        return overlap_for(seconds, fps, n_action_steps) if seconds * fps <= n_action_steps else None


@dataclass(frozen=True)
class Part:
    """Of a policy's computation.

    Attributes:
        name: of a module, or of an operator.
        calls: of it, in a call of the policy.
        seconds: in a call of the policy: the device's, where it has one of its own, else the processor's; what is
            called inside counts for a module, not for an operator.
    """

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Of a policy.

    Attributes:
        seconds: of a call.
        modules: longest first; those inside of others count in both.
        operators: longest first; on a processor the Python between them is in none.
    """

    seconds: float
    modules: list[Part]
    operators: list[Part]


def measure(call: Callable[[], Any], *, samples: int = 16, warm_up: int = 10) -> Latency:
    """Time a policy; on a GPU until the device has done its work.

    Args:
        call: gives one chunk.
        samples: timed calls.
        warm_up: calls before them.

    Raises:
        ValueError: a count is too small.
    """
    if samples < 1 or warm_up < 0:
        raise ValueError(f"samples, warm_up: got {samples} and {warm_up}, wanted at least 1 and 0")
    seconds = []
    with torch.no_grad():
        for _ in range(warm_up):
            call()
        for _ in range(samples):
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            seconds.append(time.perf_counter() - start)
    return Latency(seconds)


def profile(call: Callable[[], Any], module: nn.Module | None = None, *, depth: int = 2, samples: int = 3) -> Profile:
    """Where the time of a chunk goes, as torch.profiler sees it.

    Recording takes time too: shares mean more than seconds, and a compiled module shows no modules inside.

    Args:
        call: gives one chunk.
        module: whose submodules are told apart; None for operators alone.
        depth: how far down, 1 for its children.
        samples: recorded calls, after one that is not.

    Raises:
        ValueError: a count is too small.
    """
    if depth < 1 or samples < 1:
        raise ValueError(f"depth, samples: got {depth} and {samples}, wanted at least 1")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.no_grad(), _marked(module, depth):
        call()
        with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
            for _ in range(samples):
                with torch.profiler.record_function(MARK):
                    call()
            _wait()
    # A range of ours comes a second time from the device's side.
    events = [event for event in recorded.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    on_device = any(event.self_device_time_total for event in events)
    inside, own = (
        ("device_time_total", "self_device_time_total") if on_device else ("cpu_time_total", "self_cpu_time_total")
    )
    ranges = _parts([event for event in events if event.key.startswith(MARK)], inside, samples)
    operators = _parts([event for event in events if not event.key.startswith(MARK)], own, samples)
    whole = next(part for part in ranges if not part.name)
    modules, operators = ([part for part in parts if part.name and part.seconds] for parts in (ranges, operators))
    return Profile(whole.seconds, modules, operators)


def _parts(events: Sequence[Any], time_of: str, samples: int) -> list[Part]:
    found = [
        Part(event.key.removeprefix(MARK), event.count / samples, getattr(event, time_of) / 1e6 / samples)
        for event in events
    ]
    return sorted(found, key=lambda part: -part.seconds)


@contextmanager
def _marked(module: nn.Module | None, depth: int) -> Iterator[None]:
    """Submodules make a range of a recording."""
    hooks, open_ranges = [], []

    def begin(name: str) -> None:
        open_ranges.append(torch.profiler.record_function(MARK + name))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for name, part in module.named_modules() if module is not None else ():
        if name and name.count(".") < depth:
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: begin(name)))
            hooks.append(part.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
