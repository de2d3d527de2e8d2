"""Triton kernels are compiled, to machine code, for GPUs that need not be there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pronghorn.kernels
from pronghorn.kernels._operation import operations

FOLDERS = [Path(folder) for folder in pronghorn.kernels.__path__]
NAMES = [one.name for one in operations() if any((folder / one.name / "triton.py").exists() for folder in FOLDERS)]
GPUS = {"A100": (80, 163), "RTX 40": (89, 99), "H100": (90, 227)}  # capability, KiB of shared memory for a block


@pytest.mark.slow
@pytest.mark.fault(24)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_of_an_operation_compiles(name, gpu, figure):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "compile_all.py"), name]
    capability, limit = GPUS[gpu]
    done = subprocess.run(
        [*command, str(capability), str(limit)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels, "no kernel was launched"
    too_much = {kernel: bytes_ for kernel, (_, bytes_) in kernels.items() if bytes_ > limit * 1024}
    assert not too_much, f"more than the {limit} KiB of shared memory that a block may have"
    figure(f"{name}: kernels compiled for {gpu}", sum(count for count, _ in kernels.values()))
