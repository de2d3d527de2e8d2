"""How long a policy takes, and the overlap that hides it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The least of the values that `percent` of them do not exceed; None where there are none.

    Raises:
        ValueError: `percent` is not above 0 and at most 100.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent: got {percent}, wanted a number above 0 and at most 100")
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else None


class LatencyTracker:
    """The latest latencies of a policy, in seconds.

    The first of all, which loading and compiling lengthen, counts only until there is a second.

    Args:
        window: how many are kept.

    Raises:
        ValueError: `window` is not at least 1.
    """

    def __init__(self, window: int = 100) -> None:
        if window < 1:
            raise ValueError(f"window: got {window}, wanted at least 1")
        self._seconds: deque[float] = deque(maxlen=window)
        self._cold = True

    def add(self, seconds: float) -> None:
        """One more.

        Raises:
            ValueError: `seconds` is no finite number of at least 0.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds: got {seconds}, wanted a finite number of at least 0")
        if self._cold and self._seconds:
            self._seconds.clear()
            self._cold = False
        self._seconds.append(seconds)

    @property
    def p50(self) -> float | None:
        """What half of them do not exceed; None where there are none."""
        return percentile(self._seconds, 50)

    @property
    def p95(self) -> float | None:
        """What 95 % do not exceed."""
        return percentile(self._seconds, 95)

    @property
    def max(self) -> float | None:
        """The greatest."""
        return percentile(self._seconds, 100)

    def __len__(self) -> int:
        return len(self._seconds)


def overlap_for(latency: float, fps: float, n_action_steps: int) -> int:
    """Control steps that a latency takes, rounded up, 1 to `n_action_steps`.

    Args:
        latency: seconds.
        fps: control steps per second.
        n_action_steps: actions of a chunk that are executed.
    """
    return min(max(math.ceil(latency * fps), 1), n_action_steps)
