"""Convolutions in float32 are compared as such, also on a GPU."""

import pytest
import torch


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
