"""What several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

Config = Annotated[str | None, typer.Option(help="Published name of the architecture, for a file without it.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not compare with MODEL, write no model card.")]
BaseModel = Annotated[str | None, typer.Option(help="MODEL's hub name for the card, where it is a folder.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")]
Rfid = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="FID's Inception, for rFID: a function that gives one row of features for each of a batch of images from "
        "-1 to 1. Wants more images than features; papers have 50000.",
    ),
]


def numbers(text: str) -> list[int]:
    """Of "512,1024".

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"wanted numbers with commas, got {text!r}") from None


def pair(text: str | None) -> tuple[float, float] | None:
    """Of "0.9,0.999".

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        one, other = (None, None) if text is None else map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"wanted two numbers with a comma, got {text!r}") from None
    return None if one is None or other is None else (one, other)


def class_numbers(text: str, names: Sequence[str]) -> list[int]:
    """Of "cat,7".

    Args:
        text: names or numbers, with commas; what is a number is never a name.
        names: of classes, in the order of their numbers.

    Raises:
        ValueError: a class is not known, or is there twice.
    """
    found = []
    for word in text.split(","):
        if not word.isdecimal() and word not in names:
            known = ", ".join(names[:10]) + (" …" if len(names) > 10 else "") if any(names) else "numbers with commas"
            raise ValueError(f"classes: got {word!r}, known are {known}")
        found.append(int(word) if word.isdecimal() else names.index(word))
    if len(set(found)) < len(found):
        raise ValueError(f"classes: got {text}, wanted each once; more pictures of a class are `--each`")
    return found


def features_of(rfid: str | None, *, images: int, size: int, device: Any) -> Any:
    """What `--rfid` names, tried before any work; None where it names nothing.

    Raises:
        ValueError: there is no such function, or see `checked_features`.
    """
    if rfid is None:
        return None
    from pronghorn.cli.functions import named_function
    from pronghorn.dcae.features import checked_features

    return checked_features(rfid, named_function("rfid", rfid), images=images, size=size, device=device)


def on(module: Any, device: str | None) -> Any:
    """A module or pipeline on a device, by default the GPU if there is one."""
    import torch

    return module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
