"""Every operation at the edge of its sizes: none, one, and one less or more than tiles hold."""

import re

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import operations, relative_error

OPERATIONS = {operation.name: operation for operation in operations()}
HEADS = (33, 96, 256)  # two are head sizes of models
TILES = (17, 63, 65, 127, 129)
# Knobs of an example that are no sizes, and what a reference in float64 has no number for.
NO_SIZES = {"bits", "stride", "factor", "splits", "kernel_size", "state", "index", "types", "sizes", "group_size"}
NO_ORACLE = {("seq_is_stats", "sequences", 0): "an effective sample size of nothing is the log of 0; tested by itself"}
ERROR = re.compile(r"[a-z_]\w*[\w.\[\], ]*: ")

pytestmark = pytest.mark.fault(5)


def resized(knobs, size):
    """The knobs with each of their sizes in turn changed."""
    for key, value in knobs.items():
        if key in NO_SIZES or isinstance(value, bool) or (key == "batch" and size > 33):
            continue
        for changed in resized_value(value, size):
            yield key, {**knobs, key: changed}


def resized_value(value, size):
    """A size, or each of several in turn, or of several shapes."""
    if isinstance(value, int):
        yield size
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            for changed in resized_value(inner, size):
                yield type(value)([*value[:i], changed, *value[i + 1 :]])


def examples(operation, size):
    """Of the first shapes, and where weights are packed, of the first in each layout: some take whole tiles alone."""
    first = {knobs.get("layout"): knobs for knobs in reversed(operation.shapes)}
    return [example for knobs in first.values() for example in resized(knobs, size)]


def outcomes(operation, size, which, dtype=torch.float32):
    """How many examples were right and how many were refused, by name."""
    right = refused = 0
    for key, knobs in examples(operation, size):
        if (operation.name, key, size) in NO_ORACLE:
            continue
        with backend(which):
            try:
                arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), DEVICE)
                result = operation.function(**arguments)
            except (ValueError, TypeError) as error:
                if not ERROR.match(str(error)):
                    raise
                refused += 1
                continue
        error = relative_error(result, operation.oracle(arguments))
        assert error <= operation.tolerance[dtype], (key, size, error)
        right += 1
    return right, refused


def some_are_right(name, size, which):
    """How many examples were right; an operation that refuses all of a size would pass with nothing shown."""
    right, refused = outcomes(OPERATIONS[name], size, which)
    assert right > 0, f"all {refused} examples were refused"
    return right


@pytest.mark.parametrize(("size", "which"), [(0, "reference"), (0, "triton"), (1, "reference")])
@pytest.mark.parametrize("name", OPERATIONS)
def test_none_and_one(name, size, which, figure):
    figure("examples right", some_are_right(name, size, which))


@pytest.mark.parametrize("name", OPERATIONS)
def test_odd_sizes(name, figure):
    figure(f"{name}: odd sizes, right", sum(some_are_right(name, size, "reference") for size in HEADS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "which"), [*((size, "reference") for size in TILES), *((size, "triton") for size in (1, 17, 33, 65))]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_more_sizes_beside_tiles(name, size, which, figure):
    """Slow in the interpreter, where each block of a batch takes its time."""
    figure("examples right", some_are_right(name, size, which))
