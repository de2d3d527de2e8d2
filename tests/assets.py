"""Real weights for tests, where their package is installed or their converted form is cached."""

from pathlib import Path

import pytest
from examples.demo.smollm2 import smollm2 as converted


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a folder that transformers loads; the test is skipped where it cannot be had."""
    try:
        return converted()
    except FileNotFoundError as error:
        pytest.skip(str(error))
