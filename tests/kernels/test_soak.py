"""Every operation, ten thousand times, on a GPU a hundred thousand times: nothing grows."""

import pytest
import torch
from tests.faults.leak_slope import leak_slope
from tests.kernels.harness import DEVICE

from pronghorn.kernels._operation import operations

OPERATIONS = {operation.name: operation for operation in operations()}
CALLS = 10_000 if DEVICE.type == "cpu" else 100_000
MOST = 2**20 / CALLS  # bytes a call: 1 MiB in all


@pytest.mark.slow
@pytest.mark.fault(16)
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_grows(name, figure):
    operation = OPERATIONS[name]
    arguments = operation.example(operation.shapes[0], torch.float32, torch.Generator().manual_seed(0), DEVICE)
    found = leak_slope(lambda: operation.function(**arguments), CALLS, warm_up=CALLS // 5)
    figure(f"{name}: bytes a call", round(found["bytes"].value, 2))
    assert found["bytes"].low <= 0 or found["bytes"].value <= MOST, found["bytes"]
    assert {found[gauge].value for gauge in ("reserved", "tensors", "descriptors", "threads")} == {0}
