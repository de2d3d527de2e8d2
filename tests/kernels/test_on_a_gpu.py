"""What only a GPU can show of every operation: graphs, streams, repeats, first calls, and its memory under watch."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tests.kernels.argument_tree import paths, replaced
from tests.kernels.harness import alike

from pronghorn.kernels._operation import operations

OPERATIONS = {operation.name: operation for operation in operations()}
KINDS = [
    (name, dtype)
    for name, operation in OPERATIONS.items()
    for dtype in (torch.float32, torch.bfloat16)
    if dtype in operation.tolerance
]
REPEATS, TURNS = 100, 20
COLD_SECONDS, WARM_SECONDS = 60, 0.05

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def example(name, dtype, seed=0):
    operation = OPERATIONS[name]
    generator = torch.Generator().manual_seed(seed)
    return operation, operation.example(operation.shapes[0], dtype, generator, torch.device("cuda"))


def called(operation, arguments):
    """What it gives of copies: some operations write to what they are given."""
    for path in list(paths(arguments)):
        arguments = replaced(arguments, path, torch.clone)
    return operation.function(**arguments)


@torch.no_grad()
@pytest.mark.fault(20)
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_replayed_graph_gives_what_a_call_gives(name, dtype):
    operation, arguments = example(name, dtype)
    wanted = called(operation, arguments)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        called(operation, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            found = operation.function(**arguments)
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        pytest.skip(f"{name}: waits for the GPU, which a graph cannot")
    graph.replay()
    torch.cuda.synchronize()
    assert alike(operation, found, wanted)


@torch.no_grad()
@pytest.mark.fault(21)
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_hundred_calls_give_the_same(name, dtype):
    operation, arguments = example(name, dtype)
    wanted = called(operation, arguments)
    assert all(alike(operation, called(operation, arguments), wanted) for _ in range(REPEATS))


@torch.no_grad()
@pytest.mark.fault(22)
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_two_streams_at_once_do_not_mix(name, dtype):
    operation = OPERATIONS[name]
    given = [example(name, dtype, seed)[1] for seed in (0, 1)]
    wanted = [called(operation, arguments) for arguments in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(TURNS):
        for mine, stream, arguments in zip(found, streams, given, strict=True):
            with torch.cuda.stream(stream):
                mine.append(called(operation, arguments))
    torch.cuda.synchronize()
    for mine, one in zip(found, wanted, strict=True):
        assert all(alike(operation, result, one) for result in mine)


FIRST = """
import sys, time
import torch
from pronghorn.kernels._operation import operations
(operation,) = [one for one in operations() if one.name == sys.argv[1]]
cuda = torch.device("cuda")
given = operation.example(operation.shapes[0], getattr(torch, sys.argv[2]), torch.Generator().manual_seed(0), cuda)
torch.cuda.synchronize()
with torch.no_grad():
    for _ in range(2):
        started = time.perf_counter()
        operation.function(**given)
        torch.cuda.synchronize()
        print(time.perf_counter() - started)
"""


def in_a_process(name, dtype, *before, **variables):
    command = [*before, sys.executable, "-c", FIRST, name, str(dtype).removeprefix("torch.")]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=500)


@pytest.mark.fault(23)
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_first_call_compiles_for_a_minute_at_most(name, dtype, tmp_path, figure):
    done = in_a_process(name, dtype, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    cold, warm = map(float, done.stdout.split()[-2:])
    figure("first call, seconds", round(cold, 2))
    figure("second call, seconds", round(warm, 4))
    assert cold <= COLD_SECONDS
    assert warm < WARM_SECONDS


SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
SPLIT = ("decode_attention", "kv_quantize", "relu_linear_attention", "suffix_attention", "sparse_convolution")
assert set(SPLIT) <= OPERATIONS.keys()


@pytest.mark.parametrize(
    ("tool", "name", "dtype"),
    [pytest.param("memcheck", *kind, marks=pytest.mark.fault(4)) for kind in KINDS]
    + [pytest.param("racecheck", *kind, marks=pytest.mark.fault(22)) for kind in KINDS if kind[0] in SPLIT],
)
def test_the_sanitizer_finds_nothing(tool, name, dtype, figure):
    """PyTorch's own caching would hide what is read beyond a tensor's end."""
    if SANITIZER is None:
        pytest.skip("compute-sanitizer is not there")
    done = in_a_process(name, dtype, SANITIZER, "--tool", tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = done.stdout + done.stderr
    errors = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    assert errors is not None, said[-2000:]
    count = int(errors[1] or errors[2])
    figure(f"{tool}: errors", count)
    assert count == 0, said[:4000]
    assert done.returncode == 0, said[-2000:]
