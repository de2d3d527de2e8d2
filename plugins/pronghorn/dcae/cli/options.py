"""What several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Config = Annotated[str | None, typer.Option(help="Published name of the architecture, for a file without it.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not compare with MODEL, write no model card.")]
BaseModel = Annotated[str | None, typer.Option(help="MODEL's hub name for the card, where it is a folder.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")]


def numbers(text: str) -> list[int]:
    """Of "512,1024".

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"wanted numbers with commas, got {text!r}") from None


def on(module: Any, device: str | None) -> Any:
    """A module or pipeline on a device, by default the GPU if there is one."""
    import torch

    return module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
