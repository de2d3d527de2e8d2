"""Environment of all tests; set before torch, triton or an ecosystem is imported."""

import gc
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # which compiles itself for minutes, on a GPU

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it must be on before they are decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=12)
settings.register_profile("nightly", deadline=None, max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

AT_START = gc.get_freeze_count()  # Python's own

# By its path: LeRobot's requirements hold a package called tests.
spec = importlib.util.spec_from_file_location("fault_record", Path(__file__).parent / "faults" / "record.py")
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)
pytest_addoption = record.pytest_addoption
pytest_configure = record.pytest_configure
pytest_collection_modifyitems = record.pytest_collection_modifyitems


def pytest_runtest_logfinish():
    """vLLM freezes all objects when an engine starts, so that an engine in a test's process, a GiB, is never freed."""
    if gc.get_freeze_count() > AT_START:
        gc.unfreeze()
        gc.collect()


@pytest.fixture
def figure(record_property):
    """Keeps a number that a test measured, for docs/reliability.md: `figure("byte flips", 2000)`."""
    return lambda name, value: record_property(f"figure: {name}", value)
