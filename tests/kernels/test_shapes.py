"""Shapes at the edge of tiles, layouts and groups, drawn by hypothesis; and what packing must give back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend, error_of

from pronghorn.kernels._operation import operations
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS, pack, unpack
from pronghorn.kernels.w4a16_matmul import w4a16_matmul

OPERATIONS = {operation.name: operation for operation in operations()}


@st.composite
def packed_shapes(draw):
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    group_size = draw(st.sampled_from([32, 64, 96, 128, -1]))
    groups = draw(st.integers(1, 3))
    step = max(layout.k_multiple, 32) if group_size in (32, 96) else 64
    k = step * groups if group_size == -1 else -(-group_size * groups // step) * step
    while group_size != -1 and k % group_size:
        k += step
    n = layout.n_multiple * draw(st.integers(1, 70 if layout.n_multiple == 1 else 9 if layout.n_multiple < 64 else 1))
    knobs = {"m": draw(st.sampled_from([1, 2, 7, 8, 16, 17, 33, 257])), "n": n, "k": k, "layout": layout.name}
    return {**knobs, "bits": draw(st.sampled_from(layout.bits)), "group_size": group_size}


@pytest.mark.fault(5)
@given(knobs=packed_shapes(), which=st.sampled_from(["reference", "triton"]), seed=st.integers(0, 99))
def test_packed_operations_on_any_shape(knobs, which, seed):
    for name in ("w4a16_matmul", "dequantize_weight"):
        operation = OPERATIONS[name]
        assert error_of(operation, knobs, torch.float16, which, seed) <= operation.tolerance[torch.float16]


@given(knobs=packed_shapes(), seed=st.integers(0, 99))
def test_packing_gives_back_what_went_in(knobs, seed):
    generator = torch.Generator().manual_seed(seed)
    n, k, bits = knobs["n"], knobs["k"], knobs["bits"]
    groups = 1 if knobs["group_size"] == -1 else k // knobs["group_size"]
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    if knobs["layout"] == "marlin":
        zeros.fill_(8)
    scales = torch.rand(n, groups, generator=generator).half() + 0.01
    how = {"layout": knobs["layout"], "bits": bits, "group_size": knobs["group_size"]}
    back = unpack(pack(codes, scales, zeros, **how), **how, out_features=n, in_features=k)
    for got, put in zip(back, (codes, scales, zeros), strict=True):
        assert torch.equal(got, put)


@pytest.mark.fault(5)
@given(
    n=st.integers(1, 20),
    group_size=st.sampled_from([8, 24, 32, 100]),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    which=st.sampled_from(["reference", "triton"]),
)
def test_group_operations_on_any_shape(n, group_size, groups, bits, symmetric, which):
    knobs = {"n": n, "k": group_size * groups, "group_size": group_size, "bits": bits, "symmetric": symmetric}
    for name in ("group_fake_quantize", "group_clip_search"):
        operation = OPERATIONS[name]
        error = error_of(operation, {**knobs, "tokens": 30}, torch.float16, which)
        assert error <= operation.tolerance[torch.float16]


@pytest.mark.fault(5)
@pytest.mark.parametrize("which", ["reference", "triton"])
def test_no_rows_and_batched_rows(which):
    operation = OPERATIONS["w4a16_matmul"]
    arguments = operation.example(operation.shapes[0], torch.float32, torch.Generator().manual_seed(0), DEVICE)
    x = torch.randn(2, 3, arguments["x"].shape[1], device=DEVICE)
    with backend(which):
        assert w4a16_matmul(**{**arguments, "x": x[:0]}).shape == (0, 3, 64)
        batched = w4a16_matmul(**{**arguments, "x": x})
        flat = w4a16_matmul(**{**arguments, "x": x.reshape(6, -1)})
    assert torch.equal(batched, flat.view(2, 3, 64))
