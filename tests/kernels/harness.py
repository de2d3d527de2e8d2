"""What every operation is put through: a later one gets it by its `cases.py` alone."""

import os
from contextlib import contextmanager

import torch
from tests.kernels.argument_tree import same_bits, tensors

from pronghorn.kernels._operation import Operation, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def backend(name: str):
    """Run operations by their reference or their Triton kernel (interpreted where there is no GPU)."""
    before = os.environ.get("PRONGHORN_KERNELS")
    os.environ["PRONGHORN_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("PRONGHORN_KERNELS")
        if before is not None:
            os.environ["PRONGHORN_KERNELS"] = before


def alike(operation: Operation, found, wanted) -> bool:
    """Equal to the bit, or on a GPU, where an operation says that it is not, nearly."""
    if operation.ordered or DEVICE.type == "cpu":
        return same_bits(found, wanted)
    torch.testing.assert_close(tensors(found), tensors(wanted))
    return True


def error_of(operation: Operation, knobs, dtype: torch.dtype, which: str, seed: int = 0) -> float:
    """Relative error of one backend on a random example."""
    arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(seed), DEVICE)
    with backend(which):
        result = operation.function(**arguments)
    return relative_error(result, operation.oracle(arguments))
