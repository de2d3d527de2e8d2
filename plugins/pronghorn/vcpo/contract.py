"""VCPO's part of the contract of all methods: it trains modules of others, and has none."""

from __future__ import annotations

from pronghorn.contract import Contract

NO_MODULE = "it trains the user's model and has no module or weights of its own"

contract = Contract(
    exceptions=dict.fromkeys(("save and load", "deepcopy", "state dict", "repeats", "compile"), NO_MODULE)
)
