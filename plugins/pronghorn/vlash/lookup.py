"""What a user names on the command line: a function, a checkpoint, or what is seen by other names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pronghorn.cli.functions import named_function
from pronghorn.files.json_files import parse_json

# A repository of the Hub; what looks otherwise can be a folder alone.
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_function(value: str) -> bool:
    """Whether it is `package.module:function` rather than a folder, or a repository of the Hub."""
    return ":" in value and not Path(value).exists()


def named_pair(option: str, value: str, device: str, wanted: str, second: type = object) -> tuple[Any, Any]:
    """What a named function gives for a device: something to call, and what belongs to it.

    Args:
        option: whose value it is, for errors.
        value: the function's name.
        device: what it is called with.
        wanted: what it is to give, for errors.
        second: the type of what belongs to it.

    Raises:
        ValueError: there is no such function, or it gives something else.
    """
    found = named_function(option, value)(device)
    if not isinstance(found, tuple) or len(found) != 2:
        got = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"{option}: got {value!r}, which gives {got}; wanted {wanted}")
    if not callable(found[0]) or not isinstance(found[1], second):
        got = ", ".join(type(part).__name__ for part in found)
        raise ValueError(f"{option}: got {value!r}, which gives ({got}); wanted {wanted}")
    return found


def check_checkpoint(option: str, value: str) -> None:
    """Raise ValueError where a checkpoint can be neither a folder, since there is none, nor a repository of the Hub."""
    if not Path(value).is_dir() and not REPOSITORY.fullmatch(value):
        wanted = "a folder with a checkpoint, a repository of the Hub (owner/name), or package.module:function"
        raise ValueError(f"{option}: got {value!r}, wanted {wanted}; there is no such folder")


def renamed(text: str) -> dict[str, str]:
    """Names to names, of JSON.

    Raises:
        ValueError: it is something else.
    """
    wanted = f'rename_map: got {text!r}, wanted a JSON object of names, {{"observation.images.a": "…"}}'
    try:
        found = parse_json(text, "rename_map")
    except ValueError as error:
        raise ValueError(f"{wanted}; {error.__cause__ or error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(wanted)
    return found
