"""Writes docs/pairs.md from the rows; with `--check` it only says whether the page is up to date.

python -m tests.plugins.pairs.page
"""

from __future__ import annotations

import sys
from itertools import combinations_with_replacement
from pathlib import Path

from tests.own_methods import own_methods
from tests.plugins.pairs.rows import NEVER, REFUSED, ROWS, WORKS, Row

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "pairs.md"
TITLES = {
    "awq": "AWQ", "dcae": "DC-AE", "duoattention": "DuoAttention", "torchsparse": "TorchSparse++", "vcpo": "VCPO",
    "vlash": "VLASH",
}  # fmt: skip
INTRODUCTION = """# Pairs

Which methods go together in one model, one pipeline or one program. "Works" means that a test compares numbers with
those of a run that has one method alone, or none. "Refused" means an error with its reason before any work is done.
Where two methods never meet, there is nothing to try.

A method with itself stands for doing it twice.

<!-- Written by `make tables` from tests/plugins/pairs/rows.py; a test refuses what it does not say. -->
"""


def pairs() -> dict[tuple[str, str], list[Row]]:
    """The rows of each pair of this repository's methods, in order."""
    named = sorted(own_methods())
    return {pair: [row for row in ROWS if row.methods == pair] for pair in combinations_with_replacement(named, 2)}


def page() -> str:
    """The whole page."""
    table, sections = ["| pair | in short |", "| --- | --- |"], []
    for pair, rows in pairs().items():
        title = heading(pair)
        anchor = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_").replace(" ", "-")
        short = "<br>".join(
            f"**{state}**{': ' if any(where) else ''}{'; '.join(where)}"
            for state in (WORKS, REFUSED, NEVER)
            if (where := [row.where for row in rows if row.state == state])
        )
        table.append(f"| [{title}](#{anchor}) | {short} |")
        sections.append(f"## {title}\n\n" + "\n".join(map(_item, rows)))
    return INTRODUCTION + "\n" + "\n".join(table) + "\n\n" + "\n\n".join(sections) + "\n"


def heading(pair: tuple[str, str]) -> str:
    """Of a pair's section."""
    first, second = (TITLES.get(name, name) for name in pair)
    return f"{first}, twice" if first == second else f"{first} and {second}"


def _item(row: Row) -> str:
    where = f"{row.where}, " if row.where else ""
    says = row.says[0].upper() + row.says[1:]
    shown = "".join(f"\n    - `{test}`" for test in row.tests)
    return f"- **{where}{row.state}.** {says}.{shown}"


def main() -> None:
    """Write the page, or exit 1 if it is not up to date."""
    if PAGE.exists() and PAGE.read_text() == page():
        return
    if "--check" in sys.argv:
        sys.exit("docs/pairs.md: not made from tests/plugins/pairs/rows.py; run `make tables`")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
