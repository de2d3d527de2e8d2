"""With what, and when, something was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

LIBRARIES = ("pronghorn", "torch", "triton", "transformers", "diffusers", "lerobot", "safetensors")


def provenance(*, seed: int | None = None) -> dict[str, Any]:
    """Versions, device, date, and in a clone of Pronghorn its commit, as JSON."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (changed := _git("status", "--porcelain", "--untracked-files=no")) is None else bool(changed),
    }
    return {**found, **({} if seed is None else {"seed": seed})}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*words: str) -> str | None:
    """What git says of the clone that this file lies in; None outside of one."""
    clone, git = Path(__file__).parents[3], shutil.which("git")
    if git is None or not (clone / ".git").exists():
        return None
    done = subprocess.run([git, "-C", str(clone), *words], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None
