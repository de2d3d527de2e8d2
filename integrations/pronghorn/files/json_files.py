"""JSON files of our own: each says in which format it is, and carries a digest of what it holds.

A flipped bit makes another number of a number, which JSON cannot tell; the digest, a sha256, can. Files without one,
those of other programs and of Pronghorn before it wrote digests (format 1), are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pronghorn.files.atomic import write_atomically

FORMAT, DIGEST = "format", "sha256"
UNMARKED = 1  # the format of files that do not say theirs


def parse_json(text: str | bytes, name: str | os.PathLike[str]) -> Any:
    """JSON as its standard has it, from a file of this name: no NaN, no name twice, no nesting beyond Python's limit.

    Raises:
        ValueError: the text is something else.
    """

    def refused(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in names if names.count(key) > 1)!r} is there twice")
        return found

    try:
        return json.loads(text, parse_constant=refused, object_pairs_hook=named_once)
    except RecursionError:
        raise ValueError(f"{name}: nested too deep for a file of settings or results") from None
    except ValueError as error:
        raise ValueError(f"{name}: not the JSON that was wanted: {error}") from error


def save_json(path: Path, content: Mapping[str, Any], *, format: int) -> None:
    """Write an object as JSON, whole or not at all, with its format and digest.

    Raises:
        OSError: no room or no permission; what was there is as it was.
    """
    # First through JSON: the digest is of what a reader gets.
    held = json.loads(json.dumps(content))
    marked = {FORMAT: format, DIGEST: _digest_of_json(held, format), **held}
    write_atomically(path, (json.dumps(marked, indent=1, ensure_ascii=False) + "\n").encode())


def load_json(path: Path, *, newest: int) -> Any:
    """What `save_json` wrote; or any JSON that has no digest, as it is.

    Args:
        path: of the file.
        newest: the format that `save_json` writes today; older ones are read too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its format is newer.
    """
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict) or (DIGEST not in content and type(content.get(FORMAT)) is not int):
        return content
    return checked_json(content, path, newest=newest)


def checked_json(content: dict[str, Any], name: str | os.PathLike[str], *, newest: int) -> dict[str, Any]:
    """An object without its marks, once its format and digest are found right.

    Raises:
        ValueError: they are not.
    """
    held = {key: value for key, value in content.items() if key not in (FORMAT, DIGEST)}
    format = content.get(FORMAT)
    check_format(format, name, newest)
    if content.get(DIGEST) != _digest_of_json(held, format):
        raise ValueError(damaged(name))
    return held


def marked_json(content: Mapping[str, Any], *, format: int, **covered: str) -> dict[str, Any]:
    """An object with its format and digest, for files that have their own way of being written.

    Args:
        content: of JSON's types.
        format: its number.
        covered: what else the digest is to cover, such as the text of a file beside it.
    """
    return {**content, FORMAT: format, DIGEST: _digest_of_json({**content, **covered}, format)}


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two objects hold under the same names and differently, in words; what one of them lacks is not compared."""
    here = json.loads(json.dumps(now))  # which makes lists of tuples, as they are in what was read
    return [f"{name} was {reprlib.repr(before[name])} and is {reprlib.repr(here[name])}"
            for name in sorted(before.keys() & here.keys()) if before[name] != here[name]]  # fmt: skip


def check_format(format: Any, name: str | os.PathLike[str], newest: int) -> None:
    """Raise ValueError unless this is the number of a format that is known."""
    if type(format) is not int or format < UNMARKED:
        raise ValueError(damaged(name))
    if format > newest:
        raise ValueError(
            f"{name}: format {format}, this is {newest}: a newer Pronghorn wrote it, pip install -U pronghorn"
        )


def damaged(name: str | os.PathLike[str]) -> str:
    """What an error says of a file whose digest is another."""
    return f"{name}: damaged: what it holds is not what its {DIGEST} says; bring back a copy, or make it anew"


def _digest_of_json(content: Any, format: Any) -> str:
    return hashlib.sha256(f"{format} {json.dumps(content, sort_keys=True)}".encode()).hexdigest()
