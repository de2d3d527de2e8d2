"""Writes the tables of README and docs from the results files; with `--check` only says whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import reliability

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- benchmarks:begin (?P<wanted>[^>]*)-->\n).*?(<!-- benchmarks:end -->)", re.DOTALL)
FAULTS = re.compile(r"(<!-- reliability:begin -->\n).*?(<!-- reliability:end -->)", re.DOTALL)
# From which value on a unit is told in which other one.
SCALES: dict[str, list[tuple[float, float, str]]] = {
    "s": [(1, 1, "s"), (1e-3, 1e3, "ms"), (0, 1e6, "us")],
    "MiB": [(1e4, 2**-10, "GiB"), (0, 1, "MiB")],
    "perplexity": [(0, 1, "")],
}


def main() -> None:
    """Rewrite the pages, or exit 1 if one is not up to date."""
    stale = []
    for page in PAGES:
        old = page.read_text()
        new = BLOCK.sub(lambda match: f"{match[1]}{table(match['wanted'].split())}{match[3]}", old)
        new = FAULTS.sub(lambda match: f"{match[1]}{reliability.sections()}{match[2]}", new)
        if new != old:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"not made from benchmarks/results: {', '.join(stale)}; run `make tables`")


def table(wanted: list[str]) -> str:
    """A Markdown table of results files, by stem; `stem:a_b,c` keeps the rows that say "a b" and "c"."""
    parts = []
    for entry in wanted:
        stem, _, words = entry.partition(":")
        content = json.loads((RESULTS / f"{stem}.json").read_text())
        said = [word.replace("_", " ") for word in words.split(",") if word]
        rows = [row for row in content["rows"] if all(word in " ".join(_texts(row)) for word in said)]
        parts.append(_one(content, rows))
    return "\n".join(parts)


def _texts(row: dict[str, Any]) -> list[str]:
    return [row["what"], row["shape"], row["against"], row["unit"]]


def _one(content: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "| what | shape | ours | peer | ratio | of the hardware's limit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, theirs = (_quantity(row[side]["p50"], row["unit"]) for side in ("ours", "theirs"))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        limit = "" if row["roofline"] is None else f"{row['roofline']:.0%}"
        lines.append(f"| {row['what']} | {row['shape']} | {ours} | {theirs} ({row['against']}) | {ratio} | {limit} |")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    earlier = sorted({row["commit"][:10] for row in rows if "commit" in row})  # of rows that a later run has kept
    commit = content["commit"][:10] + (f" (some rows {', '.join(earlier)})" if earlier else "")
    commit += " with changes" if content["dirty"] else ""
    measured = f"{content['device']}, {versions}, commit {commit}, {content['date'][:10]}"
    return "\n".join([*lines, "", f"Measured on {measured}: medians, ratio above 1 where ours is better.", ""])


def _quantity(value: float, unit: str) -> str:
    scales = SCALES.get(unit, [(0, 1, unit)])
    scale, unit = next((scale, name) for least, scale, name in scales if value >= least)
    number = f"{value * scale:.4g}"
    return f"{float(number):,.0f} {unit}".strip() if "e+" in number else f"{number} {unit}".strip()


if __name__ == "__main__":
    main()
