"""Heat maps: gates by layer and head, scores by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def plot_gates(gates: Sequence[Sequence[float]], path: Path | str) -> None:
    """Write a picture of a pattern.

    Args:
        gates: [layers][key/value heads].
        path: of a PNG.
    """
    _heat_map(
        [list(row) for row in zip(*gates, strict=True)], path, x="layer", y="key/value head", label="gate", highest=1.0,
        columns=[str(layer) for layer in range(len(gates))], rows=[str(head) for head in range(len(gates[0]))],
    )  # fmt: skip


def plot_needles(
    scores: Sequence[Sequence[float]], lengths: Sequence[int], depths: Sequence[float], path: Path | str
) -> None:
    """Write a picture of a needle-in-a-haystack grid.

    Args:
        scores: [depths][lengths], from 0 to 10.
        lengths: of contexts, in tokens.
        depths: of the needle, in percent.
        path: of a PNG.
    """
    _heat_map(
        scores, path, x="context, tokens", y="depth, %", label="score", highest=10.0,
        columns=[str(length) for length in lengths], rows=[f"{depth:g}" for depth in depths],
    )  # fmt: skip


def _heat_map(
    values: Sequence[Sequence[float]], path: Path | str, *, x: str, y: str, label: str, highest: float,
    columns: list[str], rows: list[str],
) -> None:  # fmt: skip
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib", name=error.name) from None
    figure = Figure(figsize=(2 + 0.35 * len(columns), 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
    axes.set(xlabel=x, ylabel=y)
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 10 else 0)
    axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, label=label)
    figure.savefig(path, dpi=130)
