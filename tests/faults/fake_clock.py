"""A clock that goes on only when it is told to."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

READ = ("time.time", "time.monotonic", "time.perf_counter")


class FakeClock:
    """Seconds that pass when someone sleeps, or the test says so; `readings` counts who looked.

    Args:
        start: what it shows at first.
    """

    def __init__(self, start: float = 1e6) -> None:
        self.now = start
        self.readings = 0

    def read(self) -> float:
        """The time."""
        self.readings += 1
        return self.now

    def pass_by(self, seconds: float) -> None:
        """Let time pass; a negative number is a clock that was set back."""
        self.now += seconds

    @contextmanager
    def installed(self) -> Iterator["FakeClock"]:
        """In the place of the clocks of `time`, for who calls them by that name; its `sleep` takes no time."""
        with ExitStack() as stack:
            for name in READ:
                stack.enter_context(mock.patch(name, self.read))
            stack.enter_context(mock.patch("time.sleep", self.pass_by))
            yield self
