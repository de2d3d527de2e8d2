"""diffusers: `import pronghorn.diffusers` registers every installed method with it."""

from __future__ import annotations

from pronghorn.methods import Outcome, register_all
from pronghorn.versions import require

require("diffusers")


def register() -> list[Outcome]:
    """Register all methods again, such as one that was installed since; those that are there stay as they are."""
    return register_all("diffusers")


register()
