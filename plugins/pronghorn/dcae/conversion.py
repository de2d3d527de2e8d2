"""An autoencoder in another layout: a folder that is there whole, with its report and seal, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pronghorn.checkpoint import REPORT
from pronghorn.checkpoint.card import CARD
from pronghorn.checkpoint.written import write_checkpoint
from pronghorn.dcae.report import write_conversion_report
from pronghorn.estimate import tensor_bytes
from pronghorn.files.room import check_target
from pronghorn.files.sealed import INDEX

LAYOUTS = ("diffusers", "efficientvit")
WRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", INDEX, REPORT, CARD, "LICENSE*")


def check_replaceable(output: Path, source: str) -> None:
    """See whether a conversion can be written to a folder: there is none yet, or nothing but a checkpoint in it.

    Args:
        output: the folder.
        source: what is to be converted: folder, file or hub name.

    Raises:
        ValueError: the source or the working folder would be lost.
        FileExistsError: it has something else, which would be lost.
        OSError: it cannot be made.
    """
    if output.exists():
        for what, path in (("source", Path(source)), ("working folder", Path.cwd())):
            if path.exists() and output.resolve() in (path.resolve(), *path.resolve().parents):
                raise ValueError(f"output: {output} is or holds the {what}, which would be lost; choose another name")
        if not output.is_dir():
            raise FileExistsError(f"{output} exists and is no folder; choose another name or remove it")
        others = sorted(path.name for path in output.iterdir() if path.is_dir() or not _is_written(path))
        if others:
            raise FileExistsError(
                f"{output} exists and has {others[0]}, which no conversion wrote; choose another name or remove it"
            )
    check_target(output)


def convert_autoencoder(
    vae: Any, output: Path, layout: str, *, source: str, model_name: str | None = None, base_model: str | None = None,
    with_report: bool = True,
) -> str | None:  # fmt: skip
    """Write an autoencoder into a folder, which replaces what `check_replaceable` has allowed.

    Args:
        vae: an `AutoencoderDC` in evaluation mode.
        output: the folder.
        layout: of `LAYOUTS`.
        source: where it was loaded from.
        model_name: see `save_efficientvit`.
        base_model: see `write_conversion_report`.
        with_report: read it again, compare it with the source, and write that beside it.

    Returns:
        What the report says, in a line; None without one.

    Raises:
        ValueError: see `save_efficientvit`; or what was written does not load.
        OSError: no room or no permission; what was there is as it was.
    """

    def save(folder: Path) -> None:
        if layout == "diffusers":
            vae.save_pretrained(folder)
        else:
            vae.save_efficientvit(folder, model_name=model_name)

    def report(folder: Path) -> str:
        return write_conversion_report(folder, vae, source, layout, base_model, output.name)

    needed = tensor_bytes(list(vae.state_dict().values()))
    return write_checkpoint(output, save, needed=needed, report=report if with_report else None, overwrite=True)


def _is_written(path: Path) -> bool:
    return any(path.match(pattern) for pattern in WRITTEN)
