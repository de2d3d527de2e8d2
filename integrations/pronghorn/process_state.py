"""What belongs to the whole process, and is put back where a plugin changed it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class _State(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], Any]


@contextmanager
def kept() -> Iterator[list[str]]:
    """Put back, at the end, the working directory and torch's defaults; the list then names what was changed."""
    before = {name: state.read() for name, state in _states().items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, state in _states().items():
            # Where torch was imported in between, it began with what it always begins with.
            wanted = before[name] if name in before else _at_first(name)
            if state.read() != wanted:
                changed.append(name)
                state.write(wanted)


def _states() -> dict[str, _State]:
    states = {"the working directory": _State(os.getcwd, os.chdir)}
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "use_deterministic_algorithms"):
        states |= {
            "torch's default dtype": _State(torch.get_default_dtype, torch.set_default_dtype),
            "torch's gradients": _State(torch.is_grad_enabled, torch.set_grad_enabled),
            "torch's deterministic algorithms": _State(
                torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
            ),
        }
    return states


def _at_first(name: str) -> Any:
    import torch

    return {"torch's default dtype": torch.float32, "torch's gradients": True}.get(name, False)
