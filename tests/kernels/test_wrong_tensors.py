"""Every operation with each of its tensors of the wrong device, dtype or layout, or lying anyhow in memory."""

import contextlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.kernels.argument_tree import at, paths, replaced, tensors
from tests.kernels.harness import DEVICE, alike, backend

from pronghorn.kernels._operation import operations, relative_error

OPERATIONS = {operation.name: operation for operation in operations()}
NAMED = re.compile(r"(\w+)[\w.\[\], ]*: ")
# What a docstring says where a gradient is not passed on.
NO_GRADIENT = re.compile(r"othing is\s+differentiable|no\s+gradient|weight is constant", re.IGNORECASE)

pytestmark = pytest.mark.fault(4)
INTERPRETED = pytest.param("triton", marks=pytest.mark.slow)  # on a CPU


def example(operation, dtype=torch.float32):
    return operation.example(operation.shapes[0], dtype, torch.Generator().manual_seed(0), DEVICE)


def public(operation):
    """The functions of its folder."""
    room = importlib.import_module(f"pronghorn.kernels.{operation.name}")
    return [function for function in map(room.__dict__.get, room.__all__) if inspect.isfunction(function)]


def elsewhere(tensor):
    """A device that it is not on."""
    if DEVICE.type == "cpu":
        return torch.device("meta")
    return torch.device("cpu") if tensor.is_cuda else DEVICE


def wrong(tensor):
    """Names of what is wrong, as the error must give them, and how to make it so."""
    dtypes = [torch.complex64, torch.float8_e4m3fn]
    dtypes += [torch.int32, torch.bool] if tensor.is_floating_point() else [torch.float32, torch.int16]
    if tensor.dtype != torch.bool and not tensor.is_floating_point():
        dtypes.append(torch.bool)
    there = elsewhere(tensor)
    yield there.type, lambda t: t.to(there)
    yield "torch.sparse_coo", lambda t: t.to_sparse()
    for dtype in dtypes:
        yield str(dtype), lambda t, dtype=dtype: t.to(dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_wrong_tensor_is_refused_by_name(name, figure):
    operation = OPERATIONS[name]
    arguments = example(operation)
    names = {*arguments, *(key for function in public(operation) for key in inspect.signature(function).parameters)}
    places, slowest, count = list(paths(arguments)), 0.0, 0
    with backend("reference"):
        operation.function(**arguments)
        for path in places:
            for what, make in wrong(at(arguments, path)):
                changed = replaced(arguments, path, make)
                if what == elsewhere(at(arguments, path)).type and len(places) == 1:
                    assert {t.device.type for t in tensors(operation.function(**changed))} == {what}
                    continue
                start = time.perf_counter()
                with pytest.raises((ValueError, TypeError)) as refused:
                    operation.function(**changed)
                slowest, count = max(slowest, time.perf_counter() - start), count + 1
                message = str(refused.value)
                found = NAMED.match(message)
                assert found, (path, what, message)
                assert found[1] in names, (path, what, message)
                assert what in message, (path, what, message)
    assert slowest < 1.0
    figure(f"{name}: wrong tensors refused", count)


@pytest.mark.parametrize("which", ["reference", INTERPRETED])
@pytest.mark.parametrize("name", OPERATIONS)
def test_another_precision_is_right_or_refused(name, which):
    """Of one tensor: a mix is either documented, and as exact as its dtypes allow, or an error."""
    operation = OPERATIONS[name]
    arguments = example(operation)
    for path in paths(arguments):
        if not at(arguments, path).is_floating_point():
            continue
        for dtype, like in ((torch.float16, torch.float16), (torch.float64, torch.float32)):
            changed = replaced(arguments, path, lambda t, dtype=dtype: t.to(dtype))
            with backend(which):
                try:
                    result = operation.function(**changed)
                except (ValueError, TypeError) as refused:
                    if not re.search(r"torch\.float\d\d", str(refused)):
                        raise
                    continue
            error = relative_error(result, operation.oracle(changed))
            assert error <= operation.tolerance[like], (path, dtype, error)


def every_second(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def backwards(tensor):
    """Axes in the opposite order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def behind(tensor):
    """One element after the beginning of its storage, which no vector of 16 bytes fits."""
    moved = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    assert moved.numel() == 0 or moved.storage_offset() == 1
    return moved


def expanded(tensor):
    """The first of its rows again and again, with a stride of 0; places and lengths stay what they are."""
    if not tensor.is_floating_point() or not tensor.dim():
        return tensor
    return tensor[:1].expand(tensor.shape)


# Whose references multiply by PyTorch's BLAS: on some CPUs MKL rounds otherwise where a matrix lies otherwise, unless
# it is told not to before it is first used.
BY_BLAS = {"group_clip_search", "head_sparse_attention", "suffix_attention"}


@pytest.mark.parametrize(
    ("lie", "which"),
    [
        *((lie, "reference") for lie in (every_second, backwards, behind, expanded)),
        (every_second, "triton"),
        *(pytest.param(lie, "triton", marks=pytest.mark.slow) for lie in (backwards, behind, expanded)),
    ],
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_however_they_lie_results_have_the_same_bits(name, lie, which):
    if DEVICE.type != "cpu" or name not in BY_BLAS:
        check_that_bits_are_the_same(name, lie, which)
        return
    call = f"check_that_bits_are_the_same({name!r}, {lie.__name__}, {which!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.kernels.test_wrong_tensors import *; {call}"],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def check_that_bits_are_the_same(name, lie, which):
    """As they lie, and copied to where they lie side by side."""
    operation = OPERATIONS[name]
    lying = example(operation)
    for path in list(paths(lying)):
        lying = replaced(lying, path, lie)
    dense = lying
    for path in list(paths(dense)):
        dense = replaced(dense, path, lambda t: t.clone(memory_format=torch.contiguous_format))
    with backend(which), contextlib.ExitStack() as stack:
        wanted = operation.function(**dense)
        if name == "weighted_grad_accum" and lie is backwards:
            # It changes its buffers in place, and says where they do not lie as they must.
            stack.enter_context(pytest.raises(ValueError, match=r"accum\[0\]: got strides"))
        assert alike(operation, operation.function(**lying), wanted)


@pytest.mark.parametrize("which", ["reference", INTERPRETED])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gradient_that_there_is_not_is_never_wrong(name, which):
    """It is refused, or not promised: none flows, and the docstring says so."""
    operation = OPERATIONS[name]
    arguments = example(operation)
    documented = any(NO_GRADIENT.search(function.__doc__) for function in public(operation))
    for path in paths(arguments):
        if path[0] in operation.trains or not at(arguments, path).is_floating_point():
            continue
        asking = replaced(arguments, path, lambda t: t.clone().requires_grad_())
        with backend(which):
            results = [t for t in tensors(operation.timed(**asking)) if t.requires_grad]
        if not results:
            assert documented, path
            continue
        try:
            torch.autograd.backward([t.sum() for t in results])
        except RuntimeError as refused:
            if name not in str(refused):  # which operation cannot
                raise
        else:
            assert at(asking, path).grad is None, path
            assert documented, path
