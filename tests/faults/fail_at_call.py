"""An error at a chosen call of a function."""

from collections.abc import Callable
from typing import Any


class FailAtCall:
    """A function that raises at its n-th call; `fired` says that it did.

    Args:
        function: what it does otherwise.
        call: 1 for the first call.
        error: what is raised.
    """

    def __init__(self, function: Callable[..., Any], call: int, error: BaseException) -> None:
        self.function = function
        self.call = call
        self.error = error
        self.count = 0

    @property
    def fired(self) -> bool:
        """Whether the error was raised."""
        return self.count >= self.call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, or the error."""
        self.count += 1
        if self.count == self.call:
            raise self.error
        return self.function(*args, **kwargs)
