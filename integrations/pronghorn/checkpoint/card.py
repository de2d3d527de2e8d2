"""The report and the model card beside a checkpoint: `quality.json` for programs, `README.md` for people."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from pronghorn.checkpoint import REPORT
from pronghorn.checkpoint.provenance import provenance
from pronghorn.files.atomic import write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1
CARD, LICENSES = "README.md", "LICENSE*"
UNKNOWN = "the licence of %s is not known, state it in the card yourself: %s"
COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
WORST_LAYERS = 5


@dataclass(frozen=True)
class Report:
    """What there is to say of a checkpoint that was made from another, or trained.

    Attributes:
        method: its name, as people read it.
        source: folder or hub name of what it was made from; None where it began with random weights.
        library_name: that loads it, as the Hub calls it.
        recipe: the configuration that made it.
        figures: measured numbers by name; `layers`, an error for each layer, is shown by its worst.
        data: what the figures were measured on.
        usage: Python that loads it, with `CHECKPOINT` in place of its folder's name.
        texts: outputs side by side, by whose they are; the first is what was asked.
        tags: for the Hub's search.
        seed: of what was drawn, where something was.
        base_model: what the card calls the source; by default its hub name, or its folder's name.
        seconds: that measuring took.
        of_layers: what the errors of layers are errors of.
    """

    method: str
    source: str | None
    library_name: str
    recipe: Mapping[str, Any]
    figures: Mapping[str, Any]
    data: str
    usage: str
    texts: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    seed: int | None = None
    base_model: str | None = None
    seconds: float = 0.0
    of_layers: str = "the outputs of layers"

    @property
    def base(self) -> str | None:
        """The source's name on the card: a path of this machine means nothing to others."""
        if self.base_model or self.source is None:
            return self.base_model
        path = Path(self.source)
        if not path.exists():
            return self.source
        return _cached_repository(path) or path.resolve().name


def write_report(folder: Path, report: Report, name: str | None = None) -> None:
    """Write `quality.json` and `README.md` into a checkpoint's folder, and copy the source's licence.

    Args:
        folder: of the checkpoint.
        report: what there is to say.
        name: that the folder will have, where it has another one yet.

    Raises:
        OSError: no room or no permission.
    """
    made = provenance(seed=report.seed)
    content = {
        "format": FORMAT, "method": report.method, "base_model": report.base, "recipe": report.recipe,
        "figures": report.figures, "data": report.data, "texts": report.texts,
        "seconds": round(report.seconds, 3), "provenance": made,
    }  # fmt: skip
    write_atomically(folder / REPORT, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    source = None if report.source is None else _source_folder(report.source)
    known = {} if source is None else card_header(source)
    given = {name: known[name] for name in COPIED if known.get(name)}
    data = ModelCardData(
        base_model=report.base, library_name=report.library_name, tags=[*report.tags, "pronghorn"], **given
    )
    header = f"---\n{data.to_yaml()}\n---\n\n"
    write_atomically(folder / CARD, (header + _text(report, made, name or folder.name)).encode())
    for path in () if source is None else source.glob(LICENSES):
        if path.is_file():
            shutil.copy(path, folder / path.name)


def card_header(folder: Path) -> dict[str, Any]:
    """The header of the card in a checkpoint's folder; empty where there is none."""
    try:
        return dict(ModelCard.load(folder / CARD).data.to_dict()) if (folder / CARD).is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning(UNKNOWN, folder, error)
        return {}


def _source_folder(source: str) -> Path | None:
    """Where the source's card and licence are: its own folder, or the Hub's cache; None if they cannot be had."""
    path = Path(source)
    if path.exists():
        return path if path.is_dir() else path.parent
    try:
        folder = Path(snapshot_download(source, allow_patterns=[CARD, LICENSES]))
    except (OSError, ValueError) as error:
        logger.warning(UNKNOWN, source, error)
        return None
    if not (folder / CARD).is_file():
        logger.warning(UNKNOWN, source, f"{folder} has no {CARD}")
    return folder


def _cached_repository(path: Path) -> str | None:
    """The repository that a path in the Hub's cache is of, whose folders and files have hashes for names."""
    for place in (path.absolute(), path.resolve()):  # a cached file resolves to a blob, a link may lead to the cache
        if found := re.search(r"/models--([^/]+)/snapshots/", place.as_posix()):
            return found[1].replace("--", "/")
    return None


def _text(report: Report, made: Mapping[str, Any], name: str) -> str:
    origin, against = ("Made", "M") if report.base is None else (f"Made from `{report.base}`", "Against the source, m")
    parts = [
        f"# {report.base or name}, {report.method}",
        f"{origin} with {report.method} by Pronghorn {made['versions']['pronghorn']}.",
        f"```python\n{report.usage.replace('CHECKPOINT', name)}\n```",
        "## Quality",
        f"{against}easured on {report.data}.",
        _table([("", ""), *((name, _number(value)) for name, value in _flat(report.figures))]),
    ]
    layers = report.figures.get("layers")
    if layers:
        worst = sorted(layers.items(), key=lambda item: -item[1])[:WORST_LAYERS]
        parts += [
            f"Relative error of {report.of_layers}, the largest {len(worst)} of {len(layers)}:",
            _table([("layer", "error"), *((name, _number(value)) for name, value in worst)]),
        ]
    if report.texts:
        parts.append("## Side by side")
        parts += [f"{whose}:\n\n{_quoted(text)}" for whose, text in report.texts.items()]
    parts += [
        "## Recipe", f"```json\n{json.dumps(report.recipe, indent=1, sort_keys=True)}\n```",
        "## Where the figures come from",
        _table([("", ""), *((name, _number(value)) for name, value in _flat(made))]),
        f"Measuring took {report.seconds:.1f} s; all figures are in `{REPORT}`.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += [] if name == "layers" else _flat(value, f"{prefix}{name} ")
        else:
            found.append((prefix + name, value))
    return found


def _table(rows: list[tuple[str, str]]) -> str:
    head, *rest = (f"| {name} | {value} |" for name, value in rows)
    return "\n".join([head, "| --- | --- |", *rest])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in _ticks(text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _ticks(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split() if run]
