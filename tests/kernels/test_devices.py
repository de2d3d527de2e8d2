"""GPUs that are too old, of another vendor, or not there; caches and compilers that Triton lacks."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pronghorn.kernels import _dispatch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_CUDA = SimpleNamespace(device=torch.device("cuda", 0))


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.slow(NO_GPU(test)))


@pytest.fixture
def gpu(monkeypatch):
    """Whatever GPU a test wants to have: its compute capability, and whether AMD made it."""
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(_dispatch, "_installed", lambda package: True)

    def of(capability, hip=None):
        for cached in (_dispatch._too_old, _dispatch._warn_once):
            cached.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    yield of
    _dispatch._too_old.cache_clear()


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((9, 0), None, ""),
        ((8, 0), None, ""),
        ((7, 0), None, "compute capability 7.0 is below 8.0"),
        ((6, 1), None, "compute capability 6.1 is below 8.0"),
        ((9, 0), "6.4", "AMD GPUs are not tested; PRONGHORN_KERNELS=triton tries"),
    ],
)
def test_the_reference_runs_where_a_gpu_is_not_known_to_work(gpu, caplog, capability, hip, reason):
    gpu(capability, hip)
    with caplog.at_level(logging.WARNING):
        assert _dispatch.use_triton("an operation", ON_CUDA) == (not reason)
        assert _dispatch.use_triton("an operation", ON_CUDA) == (not reason)
    said = [f"an operation runs its reference implementation: {reason}"] if reason else []
    assert [record.message for record in caplog.records] == said
    # No kernel of ours in CUDA C++ is for an AMD GPU, which also calls itself 9.0.
    assert _dispatch.use_cuda("an operation", "") == (hip is None)


@pytest.mark.fault(24)
def test_an_amd_gpu_gets_triton_if_it_is_asked_for(gpu, monkeypatch):
    gpu((9, 0), "6.4")
    monkeypatch.setenv(_dispatch.VARIABLE, "triton")
    assert _dispatch.use_triton("an operation", ON_CUDA)
    assert not _dispatch.use_cuda("an operation", "")


RUN = """
import torch
from pronghorn.kernels.geglu import geglu
from pronghorn.kernels.kernel_map import kernel_map
device = "cuda" if torch.cuda.is_available() else "cpu"
gate, up = torch.arange(24., device=device).view(4, 6) / 8, torch.ones(4, 6, device=device)
wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up
torch.testing.assert_close(geglu(gate, up), wanted)
coords = torch.tensor([[0, 1], [0, 3], [0, 2]], dtype=torch.int32, device=device)
offsets = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32, device=device)
bounds = torch.tensor([[0, 1], [0, 3]])
assert kernel_map(coords, coords, offsets, stride=[1, 1], bounds=bounds).tolist() == [[0, 1, 2], [2, -1, 1]]
print(device, "right")
"""


def child(**variables):
    env = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.fault(23, 24)
@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_cpu_needs_no_gpu_no_cache_and_no_compiler(interpreted):
    nothing = {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": "/proc/nowhere", "PATH": "", "CC": "/proc/nowhere"}
    chosen = "triton" if interpreted == "1" else "reference"
    found = child(**nothing, TRITON_INTERPRET=interpreted, PRONGHORN_KERNELS=chosen)
    assert found.stdout.strip() == "cpu right", found.stderr


@on_a_gpu
@pytest.mark.fault(23)
def test_a_cache_that_cannot_be_written_is_named():
    """Triton's own error, or none: the result is right, or the folder is in the message."""
    found = child(TRITON_CACHE_DIR="/proc/nowhere", PRONGHORN_KERNELS="triton")
    assert found.stdout.strip() == "cuda right" or "/proc/nowhere" in found.stderr, found.stderr


@on_a_gpu
@pytest.mark.fault(23)
@pytest.mark.parametrize("what", ["emptied", "garbage"])
def test_a_spoilt_cache_gives_no_wrong_result(tmp_path, what):
    """A first process fills it; then each of its files is spoilt."""
    assert child(TRITON_CACHE_DIR=str(tmp_path), PRONGHORN_KERNELS="triton").stdout.strip() == "cuda right"
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"" if what == "emptied" else b"no kernel")
    found = child(TRITON_CACHE_DIR=str(tmp_path), PRONGHORN_KERNELS="triton")
    assert found.stdout.strip() == "cuda right" or found.returncode > 0, (found.returncode, found.stderr)


@on_a_gpu
@pytest.mark.fault(23)
def test_without_a_compiler_the_first_launch_says_so(tmp_path):
    """With an empty cache; what is in a cache needs none."""
    found = child(TRITON_CACHE_DIR=str(tmp_path), PRONGHORN_KERNELS="triton", PATH="", CC="/proc/nowhere")
    assert found.stdout.strip() == "cuda right" or "compiler" in found.stderr or "/proc/nowhere" in found.stderr
    assert found.returncode >= 0, found.stderr
