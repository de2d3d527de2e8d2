"""A checkpoint's folder before it is shipped: what is checked of it, and the card and report beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

CONFIGS = ("config.json", "model_index.json")
REPORT = "quality.json"


@dataclass(frozen=True)
class Finding:
    """One row of a check.

    Attributes:
        name: what was checked.
        state: "ok", "failed", or "skipped" where it could not be checked.
        detail: what was found, or what is wrong and where.
        remedy: what to do about it.
        needed: whether nothing is proved without it, where it was skipped.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    detail: str = ""
    remedy: str = ""
    needed: bool = False


def ok(name: str, detail: str = "") -> Finding:
    """A check that passed."""
    return Finding(name, "ok", detail)


def failed(name: str, detail: str, remedy: str) -> Finding:
    """A check that did not pass."""
    return Finding(name, "failed", detail, remedy)


def skipped(name: str, detail: str, remedy: str = "", *, needed: bool = False) -> Finding:
    """A check that could not be made."""
    return Finding(name, "skipped", detail, remedy, needed)


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and for whom it is checked.

    Attributes:
        folder: with `config.json`, or `model_index.json` of a pipeline.
        ecosystem: "transformers", "vllm", "diffusers" or "lerobot".
    """

    folder: Path
    ecosystem: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration; empty where there is none.

        Raises:
            ValueError: it is not a JSON object.
        """
        for name in CONFIGS:
            path = self.folder / name
            if path.is_file():
                found = json.loads(path.read_text())
                if not isinstance(found, dict):
                    raise ValueError(f"{path}: got {type(found).__name__}, wanted an object")
                return found
        return {}

    @property
    def text_config(self) -> dict[str, Any]:
        """Of a multimodal model the language model's configuration, else the whole."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config
