"""Keeps autocast out of operations: what they multiply in is theirs, and their results have their arguments' dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """A function that computes in the dtypes it chose, whatever is on outside.

    Its first argument is a tensor, or a tuple that begins with one.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = next(iter((*args, *kwargs.values())))
        tensor = first if isinstance(first, torch.Tensor) else first[0]
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return call
