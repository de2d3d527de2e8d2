"""Convolutions in float32 are compared as such, also on a GPU; a process that has no other to talk to."""

import pytest
import torch


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def no_process_group(monkeypatch):
    """An engine of vLLM in this process may have left one, in which batch norms that are shared want a GPU."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
