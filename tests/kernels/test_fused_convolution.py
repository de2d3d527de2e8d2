"""A convolution with what follows it: formats, gradients, bad input, and its CUDA kernel, which needs a Hopper GPU."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests.kernels.harness import DEVICE, backend
from tests.kernels.test_fragments import _local_bytes
from tests.kernels.test_suffix_layers import MAP, _bytes_of, _parameter_bytes

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import CAPABILITY
from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.fused_convolution import cuda, fused_convolution, runs_fused
from pronghorn.kernels.fused_convolution.cases import OPERATION

SHAPE = OPERATION.shapes[0]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY, reason="no Hopper GPU"
)
COMPILER = shutil.which("g++")
has_nvrtc = pytest.mark.skipif(not _nvrtc.available(), reason="cuda-bindings is not installed")


def example(dtype=torch.float32, seed=0, **knobs):
    generator = torch.Generator().manual_seed(seed)
    return OPERATION.example({**SHAPE, **knobs}, dtype, generator, DEVICE)


def variant(channels=512, results=512, activation=None, *, biased=False, normed=False, added=False, bfloat=True):
    return cuda.Variant(bfloat, channels, results, cuda.ACTIVATIONS[activation], biased, normed, added)


VARIANTS = [
    variant(channels, results, activation, biased=biased, normed=normed, added=added)
    for (channels, results), (activation, biased, normed, added) in itertools.product(
        [(256, 256), (512, 512), (256, 512)],
        [(None, False, False, False), ("silu", True, False, False), ("relu", True, False, True),
         (None, True, True, True), ("silu", False, True, False)],
    )
]  # fmt: skip


@pytest.mark.parametrize("missing", ["bias", "norm_bias", "residual", "norm_weight norm_bias"])
def test_what_is_not_given_is_not_there(missing):
    arguments = example()
    names = missing.split()
    given = {name: value for name, value in arguments.items() if name not in names}
    with backend("reference"):
        found = fused_convolution(**given)
        if "norm_weight" in names:
            x, weight, bias, residual = (arguments[name] for name in ("x", "weight", "bias", "residual"))
            wanted = torch.conv2d(x, weight, bias, padding=1) + residual
        else:
            wanted = fused_convolution(**arguments | {name: arguments[name] * 0 for name in names})
    torch.testing.assert_close(found, wanted)


def test_results_are_channels_last():
    arguments = example()
    with backend("reference"):
        found = fused_convolution(**arguments)
        again = fused_convolution(**arguments | {"x": arguments["x"].contiguous()})
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(again, found)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x: got list"),
        ({"weight": torch.ones(5, 3, 5, 5, device=DEVICE)}, ValueError, "weight: .*3, 3"),
        ({"weight": torch.ones(5, 2, 3, 3, device=DEVICE)}, ValueError, "weight: "),
        ({"weight": torch.ones(5, 3, 3, 3, device=DEVICE).half()}, TypeError, "weight: got torch.float16"),
        ({"bias": torch.ones(4, device=DEVICE)}, ValueError, "bias: "),
        ({"norm_weight": torch.ones(5, device=DEVICE).half()}, TypeError, "norm_weight: got torch.float16"),
        ({"norm_weight": None}, ValueError, "norm_bias: got one without norm_weight"),
        ({"residual": torch.ones(2, 5, 3, 3, device=DEVICE)}, ValueError, "residual: "),
        ({"eps": 0.0}, ValueError, "eps: got 0.0"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu', accepted are None, 'relu', 'silu'"),
    ],
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        fused_convolution(**example() | change)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="has a GPU")
def test_says_why_it_is_not_fused():
    arguments = example(torch.bfloat16, channels=256, results=256)
    assert not runs_fused(arguments["x"], arguments["weight"])
    assert cuda.obstacle(arguments["x"], arguments["weight"]) == "the device is no Hopper GPU"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "x is torch.float32"),
        ({"results": 128}, "128 results, not 256 or 512"),
        ({"channels": 128}, "128 channels, not 256 or 512"),
        ({"batch": 0}, "no pixels"),
    ],
)
def test_says_what_the_kernel_does_not_take(monkeypatch, change, words):
    monkeypatch.setattr(cuda, "is_hopper", lambda device: True)
    arguments = example(**{"dtype": torch.bfloat16, "channels": 256, "results": 256, **change})
    assert words in cuda.obstacle(arguments["x"], arguments["weight"])


@pytest.mark.parametrize(
    ("space", "batch", "results", "normed", "wanted"),
    [
        ((128, 128), 16, 512, False, True),  # 62 of 63 turns
        ((128, 128), 1, 512, False, True),  # 256 blocks in two turns of 132
        ((128, 128), 1, 512, True, True),  # 128 blocks of 132
        ((64, 64), 1, 512, False, False),  # half of the GPU
        ((256, 256), 1, 256, True, True),
        ((257, 1), 64, 256, False, False),  # most of a tile is outside
    ],
)
def test_runs_where_it_fills_the_gpu(monkeypatch, space, batch, results, normed, wanted):
    """An H100 has room for 66 clusters of two blocks."""
    monkeypatch.setattr(cuda, "index_of", lambda device: 0)
    monkeypatch.setattr(cuda, "_kernel", lambda variant, device: cuda.Loaded(None, 66))
    x, weight = torch.empty(batch, 256, *space, device="meta"), torch.empty(results, 256, 3, 3, device="meta")
    assert cuda.fills(x, weight, normed) == wanted


@has_nvrtc
@pytest.mark.parametrize("chosen", VARIANTS, ids=str)
def test_sums_stay_in_registers(chosen):
    """Of 232 registers 128 are sums and 64 a residual; a few numbers that the loop does not want may be elsewhere.

    Which, is the compiler's: of a norm in two turns NVRTC 13.0 has twelve, 13.5 has six.
    """
    most = 32 * chosen.turns if chosen.normed else 0
    for bfloat in (True, False):
        assert _local_bytes(cuda.compile_cubin(chosen._replace(bfloat=bfloat))) <= most


@has_nvrtc
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("results", cuda.RESULTS)
def test_launches_fit_the_source(monkeypatch, results, normed):
    """Arguments have the sizes that the kernel declares, and grids whole clusters."""
    launches = []

    class Recorder:
        def launch(self, grid, threads, shared_bytes, arguments):
            launches.append((grid, shared_bytes, arguments))

    chosen = []
    monkeypatch.setattr(cuda, "_kernel", lambda variant, device: chosen.append(variant) or cuda.Loaded(Recorder(), 5))
    monkeypatch.setattr(cuda, "index_of", lambda device: 0)
    monkeypatch.setattr(_nvrtc, "tensor_map", lambda x, box: boxes.append((x, box)) or MAP)
    boxes = []
    arguments = example(torch.bfloat16, batch=1, channels=256, results=results, space=(17, 30), normed=normed)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")
    out = cuda.fused_convolution(*(arguments.get(name) for name in names), 1e-5, None)
    assert out.shape == arguments["residual"].shape
    ((grid, shared_bytes, given),) = launches
    items = 4 if normed else 4 * results // 256  # eight tiles
    assert grid == (min(5, items) * cuda.CLUSTER, 1, 1)
    assert shared_bytes <= 232448 - 9 * 1024  # of an H100's block, the kernel's own arrays apart
    assert _parameter_bytes(cuda.compile_cubin(chosen[0])) == [_bytes_of(value) for value in given]
    (x, of_x), (weight, of_weight) = boxes
    assert x.shape == (1, 17, 30, 256)
    assert of_x == (1, 18, 10, 64)
    # Rows of 128 results, as the copy engine brings them: a thread has two of each eight, and they are neighbours.
    rows = weight[:4, ..., 0].reshape(-1)
    assert of_weight == (4, 4, 4, 2, 64)
    lying = arguments["weight"].permute(0, 2, 3, 1).reshape(results, -1)[:, 0]
    order = [32 * i + 8 * q + 2 * j + e for i in range(4) for j in range(4) for q in range(4) for e in range(2)]
    assert torch.equal(rows, lying[order])


class Description(ctypes.Structure):
    """Of a tensor, in the place of the copy engine's."""

    _fields_ = (("base", ctypes.c_void_p), ("shape", ctypes.c_uint64 * 5), ("stride", ctypes.c_uint64 * 5),
                ("box", ctypes.c_uint32 * 5), ("rank", ctypes.c_int), ("rest", ctypes.c_uint8 * 16))  # fmt: skip


def described(x, box):
    """In the place of `_nvrtc.tensor_map`."""
    five = ctypes.c_uint64 * 5
    return Description(x.data_ptr(), five(*x.shape), five(*x.stride()), (ctypes.c_uint32 * 5)(*box), x.dim())


def as_cpp(source):
    """What C++ has another order or no words for: alignments of shared variables, and dynamic shared memory."""
    dynamic = "extern __shared__ u8 memory[];"
    assert dynamic in source
    source = source.replace(dynamic, "u8 *memory = own_block().memory;")
    return re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", source)


class Emulated:
    """The kernel for the CPU, with as many threads as on a GPU."""

    def __init__(self, variant, folder):
        here, library = Path(__file__).parent / "emulation", folder / "convolution.so"
        (folder / "kernel.cu").write_text(as_cpp(cuda.SOURCE.read_text()))
        defined = [f"-D{name}={value}" for name, value in cuda.macros(variant).items()]
        subprocess.run(
            [COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", "-mf16c", "-pthread", "-w", f"-I{here}", *defined,
             f'-DKERNEL="{folder / "kernel.cu"}"', str(here / "convolution.cpp"), "-o", str(library)],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(library))

    def launch(self, grid, threads, shared_bytes, arguments):
        """In the place of `_nvrtc.Kernel.launch`."""
        maps = (Description * 2)(*arguments[:2])
        pointers = [value.data_ptr() for value in arguments if isinstance(value, torch.Tensor)]
        numbers = [value for value in arguments if type(value) is int]
        (eps,) = (value for value in arguments if type(value) is float)
        assert (len(pointers), len(numbers)) == (6, 4)
        self.library.launch(
            grid[0], maps, (ctypes.c_void_p * 6)(*pointers), (ctypes.c_int * 4)(*numbers), ctypes.c_float(eps)
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    ("chosen", "space", "clusters"),
    [
        (variant(128, 512, biased=True, normed=True, added=True), (17, 9), 1),
        (variant(64, 512, "silu", normed=True), (33, 5), 2),
        (variant(64, 512, "silu", biased=True), (16, 8), 1),
        (variant(128, 256, normed=True, added=True), (5, 17), 2),
        (variant(64, 256, "relu", biased=True, added=True), (1, 1), 1),
        (variant(64, 512, biased=True, normed=True, bfloat=False), (3, 30), 1),
    ],
    ids=str,
)
def test_the_kernel_on_a_cpu(chosen, space, clusters, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_kernel", lambda variant, device: cuda.Loaded(Emulated(variant, tmp_path), clusters))
    monkeypatch.setattr(cuda, "index_of", lambda device: 0)
    monkeypatch.setattr(_nvrtc, "tensor_map", described)
    arguments, activation = with_what_is_chosen(chosen, space)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")
    result = cuda.fused_convolution(*(arguments[name] for name in names), 1e-2, activation)
    assert relative_error(result, exact(arguments)) <= (3e-3 if chosen.bfloat else 5e-4)


def with_what_is_chosen(chosen, space, batch=3):
    """Arguments of an example, None where a variant has none, and the name of its activation."""
    activation = next(name for name, value in cuda.ACTIVATIONS.items() if value == chosen.activation)
    dtype = torch.bfloat16 if chosen.bfloat else torch.float16
    arguments = example(
        dtype, batch=batch, channels=chosen.channels, results=chosen.results, space=space, normed=True,
        activation=activation,
    )  # fmt: skip
    there = {"bias": chosen.biased, "norm_weight": chosen.normed, "norm_bias": chosen.normed, "residual": chosen.added}
    return arguments | {name: None for name, given in there.items() if not given}, activation


def exact(arguments):
    """The result in float64."""
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with backend("reference"):
        return fused_convolution(**wide)


@on_hopper
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(("channels", "results"), [(256, 256), (512, 512), (256, 512)])
@pytest.mark.parametrize("space", [(33, 19), (16, 8), (1, 1), (5, 130)])
def test_cuda_kernel(channels, results, space, kind):
    arguments, _ = with_what_is_chosen(VARIANTS[kind]._replace(channels=channels, results=results), space)
    assert not cuda.obstacle(arguments["x"], arguments["weight"])
    result = fused_convolution(**arguments)
    assert relative_error(result, exact(arguments)) <= 3e-3  # bfloat16 rounds by 1.7e-3 on average
    assert torch.equal(fused_convolution(**arguments), result)


@on_hopper
def test_cuda_kernel_in_a_graph():
    arguments = example(torch.bfloat16, batch=4, channels=512, results=512, space=(64, 64), normed=True)
    wanted = fused_convolution(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fused_convolution(**arguments)
    for _ in range(20):
        result.zero_()
        graph.replay()
        assert torch.equal(result, wanted)
