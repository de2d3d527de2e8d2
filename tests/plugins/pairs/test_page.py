"""The table of pairs is whole, each claim has its tests, and the page says what the table does."""

import ast
from pathlib import Path

import pytest
from tests.own_methods import own_methods
from tests.plugins.pairs.page import PAGE, TITLES, page, pairs
from tests.plugins.pairs.rows import NEVER, REFUSED, ROWS, WORKS

from pronghorn.methods import installed_methods

ROOT = Path(__file__).parents[3]


def test_every_pair_has_an_answer():
    assert [pair for pair, rows in pairs().items() if not rows] == []
    assert {row.methods for row in ROWS} <= set(pairs())
    assert set(TITLES) == set(own_methods())


def test_a_new_method_has_none(monkeypatch):
    """A folder here asks for answers; a method of another distribution does not."""
    installed = {**installed_methods(), "badluck": "badluck_plugin", "new": "pronghorn.awq"}
    monkeypatch.setattr("tests.own_methods.installed_methods", lambda: installed)
    missing = [pair for pair, rows in pairs().items() if not rows]
    assert len(missing) == len(own_methods())
    assert all("new" in pair for pair in missing)


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
