"""Writes the tables of README and docs from `benchmarks/results/*.json`; `--check` says whether they are current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
COLUMNS = ("what", "against", "shape", "unit", "ours", "theirs", "ratio", "reach", "roofline", "note")
NUMBERS = ("ours", "theirs", "ratio", "reach", "roofline")


def table(result: dict[str, Any]) -> str:
    """One results file as a Markdown table; columns that no row fills are left out."""
    rows = result["rows"]
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    dirty = " with changes" if result["dirty"] else ""
    lines = [
        f"**{result['topic']}** on {result['device']}, {result['date'][:10]}, commit {result['commit'][:9]}{dirty}",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---:" if name in NUMBERS else "---" for name in columns) + " |",
        *("| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows),
    ]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A number in three digits, the median of a measurement, or text as it is."""
    if isinstance(value, dict) and "p50" in value:
        value = value["p50"]
    if isinstance(value, float):
        return f"{value:.3g}"
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def with_tables(text: str, tables: str) -> str:
    """`text` with what stands between its markers replaced."""
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{tables}{END}{after}"


def main() -> int:
    """Write the pages; with `--check`, list those that are not current and return 1 if there are any."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    tables = "".join(f"\n{table(result)}\n\n" for result in results)
    outdated = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        if BEGIN in text and (wanted := with_tables(text, tables)) != text:
            outdated.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(wanted)
    if outdated and "--check" in sys.argv[1:]:
        print(f"not current: {', '.join(outdated)}; run `make tables`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
