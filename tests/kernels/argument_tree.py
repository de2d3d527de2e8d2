"""The tensors among an operation's arguments: in lists and in caches, too."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

Path = tuple[Any, ...]


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where the tensors are."""
    if isinstance(value, torch.Tensor):
        yield path
    for key, part in _parts(value):
        yield from paths(part, (*path, key))


def at(value: Any, path: Path) -> Any:
    """What is there."""
    for key in path:
        value = dict(_parts(value))[key]
    return value


def replaced(value: Any, path: Path, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same arguments, with one tensor changed."""
    if not path:
        return change(value)
    parts = {key: replaced(part, path[1:], change) if key == path[0] else part for key, part in _parts(value)}
    if isinstance(value, dict):
        return parts
    if hasattr(value, "_fields"):
        return value._replace(**parts)
    return type(value)(parts.values())


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, one after the other."""
    return [at(result, path) for path in paths(result)]


def same_bits(result: Any, wanted: Any) -> bool:
    """Whether two results are equal, and NaN where the other one is."""
    pairs = list(zip(tensors(result), tensors(wanted), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and _equal(a, b) for a, b in pairs)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | a.isnan()).all())
