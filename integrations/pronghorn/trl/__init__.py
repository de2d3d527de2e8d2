"""TRL: what several methods need from its trainers. Methods ship trainers of their own, which need no registration."""

from __future__ import annotations

from pronghorn.methods import Outcome, register_all
from pronghorn.versions import require

require("trl")


def register() -> list[Outcome]:
    """Register all methods again, such as one that was installed since; those that are there stay as they are."""
    return register_all("trl")


register()
