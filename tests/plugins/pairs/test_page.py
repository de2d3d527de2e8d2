"""The table of pairs is whole, each claim has its tests, and the page says what the table does."""

import ast
import importlib.util
from pathlib import Path

import pytest
from tests.plugins.pairs.page import PAGE, TITLES, page, pairs
from tests.plugins.pairs.rows import NEVER, REFUSED, ROWS, WORKS

ROOT = Path(__file__).parents[3]


def test_every_pair_has_an_answer():
    assert [pair for pair, rows in pairs().items() if not rows] == []
    assert all(row.methods == tuple(sorted(row.methods)) for row in ROWS)
    for name in TITLES:
        assert importlib.util.find_spec(f"pronghorn.{name}")
        assert any(name in row.methods for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{' '.join(row.methods)}, {row.where or NEVER}")
def test_what_is_claimed_has_tests(row):
    assert row.state in (WORKS, REFUSED, NEVER)
    assert bool(row.tests) == (row.state != NEVER)
    for test in row.tests:
        file, _, name = test.partition("::")
        found = ast.parse((ROOT / file).read_text()).body
        assert name in [part.name for part in found if isinstance(part, ast.FunctionDef)], test


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run `make tables`"
