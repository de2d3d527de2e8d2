"""Configurations from JSON: the dataclass that is asked for, or an error; nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Config = TypeVar("Config")


def from_values(kind: type[Config], values: Any) -> Config:
    """A dataclass of values by name, as JSON gives them.

    Args:
        kind: the dataclass, which checks each value.
        values: of its fields; others have their defaults.

    Raises:
        TypeError: it is no object.
        ValueError: it has other names, or is nested beyond Python's limit; and what `kind` raises.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{kind.__name__}: got {type(values).__name__}, wanted an object of settings")
    known: Any = kind
    unknown = {str(name) for name in values} - {field.name for field in fields(known)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no setting of {kind.__name__}")
    try:
        return kind(**values)
    except RecursionError:
        raise ValueError(f"{kind.__name__}: a value is nested too deep for a setting") from None
