"""The same call twice, in other company, and from many threads: the same bits."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.kernels.argument_tree import at, paths, replaced, same_bits, tensors
from tests.kernels.harness import DEVICE, alike, backend

import pronghorn.kernels
from pronghorn.kernels._operation import operations

OPERATIONS = {operation.name: operation for operation in operations()}
FOLDER = Path(pronghorn.kernels.__file__).parent
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.slow)]  # the interpreter takes its time


def example(operation, knobs=None):
    return operation.example(
        operation.shapes[0] if knobs is None else knobs, torch.float32, torch.Generator().manual_seed(0), DEVICE
    )


def run(operation, arguments):
    """Results and, where there are any, gradients."""
    for path in list(paths(arguments)):
        if path[0] in operation.trains:
            arguments = replaced(arguments, path, lambda t: t.clone().requires_grad_())
    results = tensors(operation.function(**arguments))
    if operation.trains:
        sum((result * result).sum() for result in results if result.requires_grad).backward()
    gradients = [at(arguments, path).grad for path in paths(arguments) if path[0] in operation.trains]
    return [result.detach() for result in results] + gradients


@pytest.mark.fault(21)
@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_twice_the_same_bits_also_when_torch_insists_on_it(name, which):
    """What torch would refuse to do in another order, no operation does."""
    operation = OPERATIONS[name]
    with backend(which):
        once = run(operation, example(operation))
        torch.use_deterministic_algorithms(True)
        try:
            again = run(operation, example(operation))
            repeated = run(operation, example(operation))
        finally:
            torch.use_deterministic_algorithms(False)
    assert same_bits(repeated, again)
    if not operation.ordered and which == "triton":  # the reference takes its place
        assert "differ in their last bits" in operation.function.__doc__
        torch.testing.assert_close(again, once)
    else:
        assert alike(operation, again, once)


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", OPERATIONS)
def test_atomics_are_declared(name):
    """Sums that threads add to in any order are in no kernel that promises an order."""
    operation = OPERATIONS[name]
    sources = [path.read_text() for path in (FOLDER / name).iterdir() if path.suffix in (".py", ".cu")]
    used = {found for source in sources for found in re.findall(r"(?:tl\.|\b)(atomic_?[A-Za-z]\w*)\(", source)}
    assert used == {*operation.atomics}
    assert operation.ordered == ("atomic_add" not in operation.atomics)


@pytest.mark.slow
@pytest.mark.fault(21)
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.rows])
def test_rows_do_not_depend_on_their_company(name):
    operation, compared = OPERATIONS[name], 0
    for knobs in operation.shapes[:5]:
        many = few = example(operation, knobs)
        there = [(path, operation.rows[path[0]]) for path in paths(many) if path[0] in operation.rows]
        if len({at(many, path).shape[dim] for path, dim in there}) != 1:
            continue  # an example without rows
        for path, dim in there:
            few = replaced(few, path, lambda t, dim=dim: t.narrow(dim, 0, 1).clone())
        with backend("triton"):
            results, alone = tensors(operation.function(**many)), tensors(operation.function(**few))
        assert same_bits([result[: len(one)] for result, one in zip(results, alone, strict=True)], alone)
        compared += 1
    assert compared


@pytest.mark.slow
@pytest.mark.fault(22)
@pytest.mark.parametrize("name", OPERATIONS)
def test_threads_get_what_one_gets(name):
    operation = OPERATIONS[name]
    arguments = [example(operation, knobs) for knobs in operation.shapes[:2]]
    with torch.no_grad():
        wanted = [operation.function(**given) for given in arguments]

        def calls(thread):
            mine = thread % len(arguments)
            return all(alike(operation, operation.function(**arguments[mine]), wanted[mine]) for _ in range(50))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(calls, range(8))) == [True] * 8


FORK = """
import os, sys, torch
torch.set_num_threads(1)
from pronghorn.kernels._operation import operations
results = {}
def run():
    for operation in operations():
        seed, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
        given = operation.example(operation.shapes[0], torch.float32, seed, cpu)
        found = operation.function(**given)
        yield operation.name, found if isinstance(found, torch.Tensor) else list(found)[0]
before = dict(run())
child = os.fork()
if child == 0:
    same = all(torch.equal(found.nan_to_num(), before[name].nan_to_num()) for name, found in run())
    os._exit(0 if same else 1)
print(len(before), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_fork_after_import_computes_the_same():
    env = {**os.environ, "PRONGHORN_KERNELS": "reference", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == [str(len(OPERATIONS)), "0"], found.stderr
