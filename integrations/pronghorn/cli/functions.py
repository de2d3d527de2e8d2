"""Functions that a user names on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def named_function(option: str, value: str) -> Callable[..., Any]:
    """What `package.module:function` names, also in the folder that the command was called in.

    Args:
        option: whose value it is, for errors.
        value: the name.

    Raises:
        ValueError: there is no such function.
    """
    module, _, function = value.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last of a relative name
        raise ValueError(f"{option}: got {value!r}, wanted package.module:function; {error}") from error
    if not callable(found):
        raise ValueError(f"{option}: got {value!r}, wanted a function, not {type(found).__name__}")
    named: Callable[..., Any] = found
    return named
