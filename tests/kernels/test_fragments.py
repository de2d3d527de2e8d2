"""The CUDA kernels of the "fragments" layout: tiles that fit, code without spills, and every kernel's result."""

import re
import struct

import pytest
import torch
from tests.kernels.harness import DEVICE, error_of

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._dispatch import use_cuda
from pronghorn.kernels._hopper import CAPABILITY
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS, pack, repack
from pronghorn.kernels.w4a16_matmul import cuda, preferred_layout
from pronghorn.kernels.w4a16_matmul.cases import OPERATION

SHAPES = [
    (4096, 4096),
    (6144, 4096),
    (14336, 4096),
    (28672, 4096),
    (4096, 14336),
    (1024, 1024),
    (8192, 28672),
    (4096, 131072),
    (64, 192),
]
ROWS = [*range(1, 300), 300, 400, 511, 600, 777, 1000, 1500, 2048, 5000, 8192]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY, reason="no Hopper GPU"
)


@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_plans_fit_and_are_prepared(outputs, columns):
    prepared = {cuda.plan(rows, outputs, columns) for rows in cuda.PREPARED_ROWS}
    for rows in ROWS:
        plan = cuda.plan(rows, outputs, columns)
        assert plan in prepared
        assert plan.tokens >= min(rows, 8)
        assert plan.shared_bytes(rows, columns) <= cuda.SHARED_BYTES
        assert plan.split <= 8  # the largest cluster that every GPU of the kind takes


@pytest.mark.skipif(not _nvrtc.available(), reason="cuda-bindings is not installed")
def test_every_plan_compiles_without_spilling():
    plans = {cuda.plan(rows, *shape) for rows in ROWS for shape in SHAPES}
    for plan in plans:
        for bits, group_size, bfloat in ((4, 128, False), (3, 32, True), (2, 0, True)):
            chunks = min(plan.chunks, 1 if group_size % 128 else 2)
            cubin = cuda.compile_cubin(plan, chunks, bits, group_size, bfloat)
            assert _local_bytes(cubin) == 0, plan


def _local_bytes(cubin):
    """Size of the largest stack frame: the ELF attribute EIATTR_FRAME_SIZE (0x11) in the section ".nv.info"."""
    found = re.findall(rb"\x04\x11\x08\x00....(....)", _section(cubin, b".nv.info"), re.DOTALL)
    assert found
    return max(int.from_bytes(size, "little") for size in found)


def _section(elf, name):
    """Bytes of a section of a 64-bit ELF file."""
    (start,), (size, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<3H", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, start + size * i) for i in range(count)]
    texts = elf[sections[names][4] :]
    _, _, _, _, at, length = next(each for each in sections if texts[each[0] :].split(b"\0", 1)[0] == name)
    return elf[at : at + length]


def test_a_single_row_may_have_any_stride(monkeypatch):
    """The copy engine wants strides that are multiples of 16 bytes, also of what there is one of."""
    given = []
    monkeypatch.setattr(_nvrtc, "_tensor_map", lambda pointer, shape, strides, box, bfloat: given.append(strides))
    x = torch.empty(3, 64, dtype=torch.bfloat16)
    _nvrtc.tensor_map(x.as_strided((1, 3, 1, 64), (1, 64, 7, 1)), (1, 1, 1, 64))
    assert given == [(8, 64, 8, 1)]


@pytest.mark.skipif(not _nvrtc.available(), reason="cuda-bindings is not installed")
def test_source_that_does_not_compile_says_why(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("this is no CUDA")
    with pytest.raises(RuntimeError, match=r"broken\.cu.*does not compile.*error"):
        _nvrtc.compile_cubin(source, "sm_90a", {})


@pytest.mark.parametrize(
    ("source", "bits"),
    [(name, bits) for name, layout in LAYOUTS.items() for bits in layout.bits if name != "fragments" and bits < 8],
)
def test_repacking_is_lossless(source, bits):
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, (128, 256), dtype=torch.uint8)
    scales = torch.rand(128, 4).half() + 0.01
    zeros = torch.randint(0, 2**bits, (128, 4), dtype=torch.uint8)
    if source == "marlin":
        zeros.fill_(8)
    how = {"bits": bits, "group_size": 64}
    shape = {"out_features": 128, "in_features": 256}
    stored = pack(codes, scales, zeros, layout=source, **how)
    there = repack(stored, source, "fragments", **how, **shape)
    back = repack(there, "fragments", source, **how, **shape)
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_the_layout_stays_where_no_kernel_wants_another():
    how = {"bits": 4, "group_size": 64, "in_features": 256, "dtype": torch.float16, "device": torch.device("cpu")}
    assert preferred_layout("natural", out_features=128, **how) == "natural"
    assert preferred_layout("natural", out_features=100, **how) == "natural"


def test_falling_back_to_triton_is_logged_once(caplog, monkeypatch):
    monkeypatch.delenv("PRONGHORN_KERNELS", raising=False)
    assert use_cuda("some_operation", "")
    for _ in range(2):
        assert not use_cuda("some_operation", "the scales have another dtype")
    assert caplog.text.count("some_operation runs its Triton kernel: the scales have another dtype") == 1
    monkeypatch.setenv("PRONGHORN_KERNELS", "triton")
    assert not use_cuda("some_operation", "")


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 64), (4, 32), (4, -1), (3, 128), (3, 32), (2, 192)])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 33, 65, 130, 257])
def test_every_kernel_against_the_oracle(m, bits, group_size, dtype):
    for n, k in ((208, 384), (1024, 2304)):
        knobs = {"m": m, "n": n, "k": k, "layout": "fragments", "bits": bits, "group_size": group_size}
        assert error_of(OPERATION, knobs, dtype, "") <= OPERATION.tolerance[dtype]


@on_hopper
def test_a_captured_graph_gives_the_same():
    knobs = {"m": 3, "n": 1024, "k": 2304, "layout": "fragments", "bits": 4, "group_size": 128}
    arguments = OPERATION.example(knobs, torch.float16, torch.Generator().manual_seed(0), DEVICE)
    wanted = OPERATION.function(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPERATION.function(**arguments)
    graph.replay()
    assert torch.equal(captured, wanted)


@on_hopper
def test_views_need_not_be_aligned():
    knobs = {"m": 3, "n": 64, "k": 192, "layout": "fragments", "bits": 4, "group_size": 64}
    arguments = OPERATION.example(knobs, torch.float16, torch.Generator().manual_seed(0), DEVICE)
    buffer = torch.zeros(3 * 192 + 1, dtype=torch.float16, device=DEVICE)
    buffer[1:] = arguments["x"].flatten()
    wanted = OPERATION.function(**arguments)
    assert torch.equal(OPERATION.function(**{**arguments, "x": buffer[1:].view(3, 192)}), wanted)
