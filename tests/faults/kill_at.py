"""SIGKILL at a chosen event: what a power cut or an impatient scheduler does."""

import os
import signal
from collections.abc import Iterable
from typing import Any


class KillAt:
    """Counts the calls of some functions and kills this process just before the n-th; 0 only counts.

    Args:
        call: 1 for the first call.
        functions: (owner, attribute name) of each.
    """

    def __init__(self, call: int, functions: Iterable[tuple[Any, str]]) -> None:
        self.call = call
        self.count = 0
        for owner, name in functions:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted
