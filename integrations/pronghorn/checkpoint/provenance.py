"""With what, and when, something was made."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pronghorn.versions import versions

CLONE = Path(__file__).parents[3]  # where it is one
LIBRARIES = ("pronghorn", "torch", "triton", "transformers", "diffusers", "lerobot", "safetensors")


def provenance(*, seed: int | None = None) -> dict[str, Any]:
    """Versions, device, date, and in a clone of Pronghorn its commit, as JSON."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "versions": {"python": platform.python_version(), **versions(LIBRARIES)},
        "commit": git(CLONE, "rev-parse", "HEAD"),
        "dirty": None
        if (changed := git(CLONE, "status", "--porcelain", "--untracked-files=no")) is None
        else bool(changed),
    }
    return {**found, **({} if seed is None else {"seed": seed})}


def git(clone: Path, *words: str) -> str | None:
    """What git says of a clone; None where there is none, or no git."""
    program = shutil.which("git")
    if program is None or not (clone / ".git").exists():
        return None
    command = [program, "-C", str(clone), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - no user's input
    return done.stdout.strip() if done.returncode == 0 else None
