"""Whether something grows from call to call: a regression line over samples, with the confidence there is in it."""

import gc
import math
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLES = 20
STUDENT = 2.101  # 97.5 % point of Student's t for the 18 degrees of freedom that 20 samples leave


@dataclass(frozen=True)
class Slope:
    """Growth for each call, and the interval that it lies in with 95 % confidence."""

    value: float
    low: float
    high: float


def private_memory(process: int | str = "self") -> int:
    """Bytes that are a process's own, in memory or swapped out; RSS alone hides a leak that was swapped out."""
    status = Path(f"/proc/{process}/status").read_text()
    return sum(1024 * int(kib) for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE))


def live_tensors() -> int:
    """Tensors that there are, save those from before `gc.freeze()`."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def descriptors(process: int | str = "self") -> int:
    """Open files."""
    return len(os.listdir(f"/proc/{process}/fd"))  # noqa: PTH208 - Path would open one of its own for longer


def reserved() -> int:
    """Bytes that PyTorch holds of a GPU."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


GAUGES: dict[str, Callable[[], int]] = {
    "bytes": private_memory,
    "reserved": reserved,
    "tensors": live_tensors,
    "descriptors": descriptors,
    "threads": threading.active_count,
}


def line(places: list[float], values: list[float]) -> Slope:
    """The least-squares line through `SAMPLES` points."""
    middle, mean = sum(places) / len(places), sum(values) / len(values)
    spread = sum((place - middle) ** 2 for place in places)
    slope = sum((p - middle) * (v - mean) for p, v in zip(places, values, strict=True)) / spread
    off = sum((v - mean - slope * (p - middle)) ** 2 for p, v in zip(places, values, strict=True))
    width = STUDENT * math.sqrt(off / (len(places) - 2) / spread)
    return Slope(slope, slope - width, slope + width)


def leak_slope(call: Callable[[], object], calls: int, warm_up: int = 0) -> dict[str, Slope]:
    """Growth of each gauge for each call.

    Args:
        call: what may leak.
        calls: how often it is called, between samples a `SAMPLES`-th of it.
        warm_up: calls before the first sample, which fill caches.
    """
    for _ in range(warm_up):
        call()
    places: list[float] = []
    values: dict[str, list[float]] = {name: [] for name in GAUGES}
    gc.collect()
    gc.freeze()  # what was there before need not be looked through at every sample
    try:
        for sample in range(SAMPLES):
            for _ in range(calls // SAMPLES):
                call()
            places.append((sample + 1) * (calls // SAMPLES))
            for name, gauge in GAUGES.items():
                values[name].append(gauge())
    finally:
        gc.unfreeze()
    return {name: line(places, found) for name, found in values.items()}
