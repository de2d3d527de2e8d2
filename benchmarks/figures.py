"""Writes single figures of the results files into sentences of README and docs; `--check` only says if they are right.

In a page, `<!-- figure:begin ratio dcae-compiled-h100:decode -->1.15x to 1.17x<!-- figure:end -->` holds the ratios of
the rows that say "decode". In place of `ratio` there may be `reach` (the bar that was set), `ours` or `theirs`. Rows
are chosen as `tables.py` does, and ";" in a word stands for a comma.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import tables

FIGURE = re.compile(r"(<!-- figure:begin (ratio|reach|ours|theirs) (\S+) -->)[^<]*(<!-- figure:end -->)")
UNTOLD = ("reward", "success", "count")  # units that a sentence has words for


def main() -> None:
    """Rewrite the pages, or exit 1 if one is not up to date."""
    stale = []
    for page in tables.PAGES:
        old = page.read_text()
        new = FIGURE.sub(lambda match: f"{match[1]}{figure(match[2], match[3])}{match[4]}", old)
        if new != old:
            stale.append(str(page.relative_to(tables.ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"figures not from benchmarks/results: {', '.join(stale)}; run `make tables`")


def figure(side: str, wanted: str) -> str:
    """A number of the rows that are wanted, or their least and greatest.

    Raises:
        SystemExit: no row says all that.
    """
    stem, _, words = wanted.partition(":")
    said = [word.replace("_", " ").replace(";", ", ") for word in words.split(",") if word]
    rows = [
        row
        for row in json.loads((tables.RESULTS / f"{stem}.json").read_text())["rows"]
        if all(word in " ".join(tables._texts(row)).replace("_", " ") for word in said)
    ]
    found = sorted({_value(row, side): _said(row, side) for row in rows}.items())
    if not found:
        sys.exit(f"benchmarks/results/{stem}.json has no row that says {', '.join(said)}")
    return " to ".join(dict.fromkeys([found[0][1], found[-1][1]]))


def _value(row: dict[str, Any], side: str) -> float:
    return float(row[side] if side in ("ratio", "reach") else row[side]["p50"])


def _said(row: dict[str, Any], side: str) -> str:
    if side in ("ratio", "reach"):
        return f"{row[side]:.2f}x"
    return tables._quantity(row[side]["p50"], "" if row["unit"] in UNTOLD else row["unit"])


if __name__ == "__main__":
    main()
