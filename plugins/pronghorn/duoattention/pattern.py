"""Patterns: tables of gates on disk, and which heads they make retrieval heads."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.files.atomic import remove_parts, write_atomically
from pronghorn.files.json_files import checked_json, marked_json, parse_json

GATES, SETTINGS = "full_attention_heads.tsv", "config.json"
MARK, FORMAT = "pronghorn", 2  # in the settings: format and digest of both files
TIE_NOISE = 1e-6  # added before ranking, so that the seed decides between equal gates


@dataclass
class Pattern:
    """The gates of a model, and what is known of how they were found.

    Attributes:
        gates: [layers][key/value heads].
        settings: `config.json`; the authors' holds all arguments of the training, `sink_size` and `recent_size` among
            them.
    """

    gates: list[list[float]]
    settings: dict[str, Any] = field(default_factory=dict)


def load_pattern(pattern: str | os.PathLike[str]) -> Pattern:
    """Read a pattern's folder, or a published pattern by its name.

    Raises:
        FileNotFoundError: there is no such folder or no such published pattern.
        ValueError: a line is not numbers, lengths differ, a number is not finite, or the settings are not JSON.
    """
    folder = Path(pattern)
    if not (folder / GATES).is_file() and str(pattern) in published_patterns():
        folder = Path(__file__).parent / "patterns" / str(pattern)
    if not (folder / GATES).is_file():
        raise FileNotFoundError(
            f"pattern: no {GATES} in {folder}; published patterns are {', '.join(published_patterns())}"
        )
    rows = []
    try:
        table = (folder / GATES).read_text()
    except ValueError as error:
        raise ValueError(f"{folder / GATES}: is no text: {error}") from None
    for number, line in enumerate(table.splitlines(), 1):
        try:
            rows.append([float(cell) for cell in line.split("\t")])
        except ValueError:
            raise ValueError(
                f"{folder / GATES}, line {number}: wanted numbers with tabs between, got {line!r}"
            ) from None
    gates = checked_gates(rows, str(folder / GATES))
    if not (folder / SETTINGS).is_file():
        return Pattern(gates)
    settings = parse_json((folder / SETTINGS).read_bytes(), folder / SETTINGS)
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / SETTINGS}: got {type(settings).__name__}, wanted an object")
    if MARK in settings:
        mark = settings.pop(MARK)
        held = checked_json({**(mark if isinstance(mark, dict) else {}), "settings": settings, "gates": table},
                            folder / SETTINGS, newest=FORMAT)  # fmt: skip
        settings = held["settings"]
    return Pattern(gates, settings)


def save_pattern(pattern: Pattern, folder: str | os.PathLike[str]) -> None:
    """Write a pattern's folder; each file is there whole or not at all, and a digest tells that they are a pair."""
    lines = ["\t".join(f"{gate:.18e}" for gate in row) for row in checked_gates(pattern.gates)]
    table, settings = "\n".join(lines) + "\n", json.loads(json.dumps(pattern.settings))
    mark = marked_json({}, format=FORMAT, settings=settings, gates=table)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    remove_parts(target)
    write_atomically(target / SETTINGS, (json.dumps({**settings, MARK: mark}, indent=2) + "\n").encode())
    write_atomically(target / GATES, table.encode())


def threshold_gates(
    gates: list[list[float]],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    balance: str = "global",
    seed: int = 42,
) -> list[list[bool]]:
    """Which heads are retrieval heads.

    Args:
        gates: [layers][key/value heads].
        sparsity: share of heads that are to stream.
        threshold: or the gate from which on a head is full; no noise, no seed.
        balance: "global" or "per_layer".
        seed: decides between equal gates.

    Returns:
        [layers][key/value heads], True for a retrieval head.

    Source: DuoAttention (arXiv 2410.10819), section 2.3; clipping, noise and quantile as in the authors' code.
    """
    table = np.clip(np.asarray(checked_gates(gates), dtype=np.float64), 0, 1)
    if threshold is not None:
        return [[bool(cell) for cell in row] for row in table >= threshold]
    if sparsity is None:
        raise ValueError("sparsity: got None and no threshold; give one of them")
    table = table + np.random.RandomState(seed).uniform(0, TIE_NOISE, table.shape)
    if balance == "per_layer":
        streaming = round(sparsity * table.shape[1])
        full = table.argsort(axis=1, kind="stable").argsort(axis=1) >= streaming
    elif sparsity >= 1 or sparsity <= 0:
        full = np.full(table.shape, sparsity <= 0)
    else:
        full = table >= np.quantile(table, sparsity)
    return [[bool(cell) for cell in row] for row in full]


def checked_gates(gates: Any, name: str = "gates") -> list[list[float]]:
    """A table [layers][key/value heads] of finite numbers; ValueError or TypeError otherwise."""
    rows = gates.tolist() if hasattr(gates, "tolist") else gates
    if not isinstance(rows, list) or not rows or not all(isinstance(row, (list, tuple)) and row for row in rows):
        raise TypeError(f"{name}: got {type(gates).__name__}, wanted a table of layers and their key/value heads")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name}: rows have {sorted({len(row) for row in rows})} heads, wanted as many in every layer")
    for layer, row in enumerate(rows):
        for head, gate in enumerate(row):
            if isinstance(gate, bool) or not isinstance(gate, (int, float)) or not math.isfinite(gate):
                raise ValueError(f"{name}: got {gate!r} for head {head} of layer {layer}, wanted a finite number")
    return [[float(gate) for gate in row] for row in rows]


def published_patterns() -> list[str]:
    """Names of the patterns that the authors published and that come with Pronghorn."""
    return sorted(path.name for path in (Path(__file__).parent / "patterns").iterdir() if path.is_dir())
