"""Every golden case of VLASH in the folder that PRONGHORN_GOLDEN names; one that nobody can replay fails."""

import os
from pathlib import Path

import pytest
import torch

from pronghorn.vlash.verify import cases, replay

ROOT = Path(os.environ.get("PRONGHORN_GOLDEN") or Path(__file__).parent / "data")
FOLDER = ROOT / "vlash" if (ROOT / "vlash").is_dir() else ROOT
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_there_are_cases():
    assert cases(FOLDER), f"no golden file in {FOLDER}"


@pytest.mark.parametrize("path", cases(FOLDER), ids=lambda path: f"{path.stem}")
def test_replays(path):
    checks = replay(path, DEVICE)
    assert checks
    assert not [check for check in checks if not check.passed]


def test_an_unknown_kind_fails(tmp_path):
    with pytest.raises(ValueError, match="unknown kind"):
        replay(tmp_path / "something_new.safetensors")
