"""Every operation against its float64 oracle, by reference and by Triton, and as a torch operation."""

import pytest
import torch
from tests.kernels.argument_tree import tensors
from tests.kernels.harness import DEVICE, alike, backend, error_of

from pronghorn.kernels._operation import operations

OPERATIONS = {operation.name: operation for operation in operations()}
CASES = [(name, index) for name, operation in OPERATIONS.items() for index in range(len(operation.shapes))]
EXACT_IN_BFLOAT16 = ("group_fake_quantize", "group_clip_search")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.fault(5)
@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CASES)
def test_matches_the_oracle(name, index, dtype, which):
    operation = OPERATIONS[name]
    if which == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16 and name in EXACT_IN_BFLOAT16:
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding; this runs on a GPU")
    error = error_of(operation, operation.shapes[index], dtype, which)
    assert error <= operation.tolerance[dtype], f"{error:.2e} on {operation.shapes[index]}"


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("name", "index", "which"),
    [(*case, "reference") for case in CASES] + [(name, at, "triton") for name in OPERATIONS for at in (0, -1)],
)
def test_autocast_changes_nothing(name, index, which):
    """What an operation multiplies in is its own, and so is the dtype of its result."""
    operation = OPERATIONS[name]

    def run():
        arguments = operation.example(operation.shapes[index], torch.float32, torch.Generator().manual_seed(0), DEVICE)
        trained = [arguments[key].requires_grad_() for key in operation.trains if arguments.get(key) is not None]
        result = operation.function(**arguments)
        if not trained:
            return result
        results = [tensor for tensor in tensors(result) if tensor.requires_grad]
        return result, torch.autograd.grad(results, trained, [torch.ones_like(tensor) for tensor in results])

    with backend(which):
        wanted = run()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert alike(operation, run(), wanted)


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", OPERATIONS)
def test_is_one_torch_operation(name):
    operation = OPERATIONS[name]
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "pronghorn":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    arguments = operation.example(operation.shapes[0], torch.float32, torch.Generator().manual_seed(0), DEVICE)
    with backend("reference"), Spy():
        operation.function(**arguments)
    assert [func.__name__.split(".")[0] for func, _ in seen] == [name]
    with backend("reference"):
        torch.library.opcheck(*seen[0])


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.trains])
def test_gradients(name):
    operation = OPERATIONS[name]
    for knobs in operation.shapes[:4]:
        small = {**knobs, "n": 64, "k": 64, "m": 2, "group_size": 32}
        arguments = operation.example(small, torch.float64, torch.Generator().manual_seed(0), torch.device("cpu"))
        trained = [arguments[key].requires_grad_() for key in operation.trains]

        def call(*values, arguments=arguments):
            return operation.function(**{**arguments, **dict(zip(operation.trains, values, strict=True))})

        with backend("reference"):
            # Entry by entry, or where there are thousands along a random direction.
            many = sum(tensor.numel() for tensor in trained) > 2000
            assert torch.autograd.gradcheck(call, trained, fast_mode=many)


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_without_a_graph_break(name):
    operation = OPERATIONS[name]
    if name == "group_clip_search":
        pytest.skip("its checked quantity is computed outside the operation; opcheck covers tracing")
    arguments = operation.example(operation.shapes[0], torch.float32, torch.Generator().manual_seed(0), DEVICE)
    with backend("reference"):
        compiled = torch.compile(operation.function, fullgraph=True, backend="aot_eager")
        result, wanted = compiled(**arguments), operation.function(**arguments)
    torch.testing.assert_close(result, wanted, rtol=0, atol=0)
