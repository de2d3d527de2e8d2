"""While a graph is recorded, nothing is collected; afterwards all is as before."""

import gc

import pytest

from pronghorn.kernels._recording import nothing_freed


@pytest.mark.parametrize("collects", [True, False])
def test_collecting_pauses(collects, monkeypatch):
    monkeypatch.setattr(gc, "isenabled", lambda: collects)
    called = []
    monkeypatch.setattr(gc, "disable", lambda: called.append("disable"))
    monkeypatch.setattr(gc, "enable", lambda: called.append("enable"))
    with nothing_freed():
        assert called == ["disable"]
    assert called == ["disable", *(["enable"] if collects else [])]
