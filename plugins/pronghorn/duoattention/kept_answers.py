"""Answers of a long evaluation on disk, so that it can be resumed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pronghorn.estimate import Estimate, of_pieces
from pronghorn.files.json_files import load_json, save_json

FORMAT = 2


class KeptAnswers:
    """A JSON file of answers, written as a whole after each.

    Args:
        path: of the file; it is read if it is there.
        settings: of the evaluation.

    Raises:
        ValueError: the file is of other settings (they are named), or damaged.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._answers: dict[str, str] = {}
        if not path.exists():
            return
        try:
            content = load_json(path, newest=FORMAT)
            stored, self._answers = dict(content["settings"]), dict(content["answers"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to start anew") from error
        differing = [name for name in {**stored, **self._settings} if stored.get(name) != self._settings.get(name)]
        if differing:
            raise ValueError(f"{path} holds answers of another run; these differ: {', '.join(sorted(differing))}")

    def get(self, name: str) -> str | None:
        """The answer of this name, if it is known."""
        return self._answers.get(name)

    def keep(self, name: str, answer: str) -> None:
        """Add an answer."""
        self._answers[name] = answer
        save_json(self._path, {"settings": self._settings, "answers": self._answers}, format=FORMAT)


def rehearse(
    lengths: Sequence[int], ask: Callable[[int], str], settings: dict[str, Any], device: torch.device, what: str
) -> Estimate:
    """What an evaluation takes whose prompts have these lengths, with the file of its answers; asks a few of them.

    Args:
        lengths: of all prompts, in tokens.
        ask: the answer to the prompt of an index.
        settings: of the evaluation.
        device: of the model.
        what: its prompts are called.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.json"
        kept = KeptAnswers(path, settings)
        kept.keep("", "")
        empty = path.stat().st_size

        def work(index: int) -> int:
            before = path.stat().st_size
            kept.keep(f"{index} {before}", ask(index))  # a name that was not there yet
            return path.stat().st_size - before

        found = of_pieces(lengths, work, device, what)
    return replace(found, disk_bytes=found.disk_bytes + empty)
