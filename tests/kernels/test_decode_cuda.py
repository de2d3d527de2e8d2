"""The CUDA kernel of `decode_attention`: compiled for the CPU, with threads for its threads, and on a Hopper GPU."""

import ctypes
import subprocess
from pathlib import Path
from shutil import which

import pytest
import torch
from tests.kernels.harness import DEVICE, backend
from tests.kernels.test_decode_attention import coded, decoded, paged, random
from tests.kernels.test_fragments import _local_bytes

import pronghorn.kernels.decode_attention as operation
from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import CAPABILITY
from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.decode_attention import CachedHeads, cuda, decode_attention
from pronghorn.kernels.decode_attention.call import Call

INDEX = [-1, 0, 1]
COMPILER = which("g++")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
CASES = {
    "16 bits": {},
    "bfloat16": {"dtype": torch.bfloat16, "softcap": 4.0},
    "8 bits in pages": {"bits": 8, "pages": True},
    "8 bits, bfloat16": {"bits": 8, "dtype": torch.bfloat16, "group": 1, "token": False},
    "4 bits": {"bits": 4, "start": (0, 19)},
    "4 bits, bfloat16, in pages": {"bits": 4, "dtype": torch.bfloat16, "pages": True},
    "4 bits, 64 channels": {"bits": 4, "size": 64, "group": 8},
    "many query heads": {"group": 12, "size": 64},
    "sink and window": {"window": (20, 50), "pages": True, "start": (3, 40)},
    "window without a gap": {"window": (90, 5), "pages": True, "start": (0, 95)},
    "one block a head": {"blocks": 1, "lengths": (0, 190)},
}
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY, reason="no Hopper GPU"
)


def example(
    dtype=torch.float16, size=128, group=4, lengths=(150, 90), bits=16, token=True, start=None, pages=False,
    window=(0, None), softcap=0.0,
):  # fmt: skip
    """Arguments, and the result in float64 by the reference."""
    caches, exact = [], []
    for count, capacity, filled, seen in ((2, 200, lengths, window), (1, 20, (20, 20), (0, None))):
        key, value = (random(2, count, capacity, size, dtype=dtype, seed=seed) for seed in (1, 2))
        length = torch.tensor(filled, dtype=torch.int32, device=DEVICE)
        cache = CachedHeads(key, value, length, None if start is None else length.new_tensor(start))
        cache = cache if bits == 16 else coded(cache, bits)
        wide = decoded(cache, bits, torch.float64) if bits < 16 else cache
        wide = wide._replace(key=wide.key.double(), value=wide.value.double())
        exact.append(wide._replace(sink_size=seen[0], recent_size=seen[1]))
        cache = paged(cache, 32) if pages else cache
        caches.append(cache._replace(sink_size=seen[0], recent_size=seen[1]))
    query = random(2, 3 * group, 1, size, dtype=dtype)
    more = {"key": 3, "value": 4} if token else {}
    tokens = {name: random(2, 3, 1, size, dtype=dtype, seed=seed) for name, seed in more.items()}
    index = torch.tensor(INDEX, dtype=torch.int32, device=DEVICE)
    with backend("reference"):
        wanted = decode_attention(
            query.double(), *exact, index, softcap=softcap, **{name: tensor.double() for name, tensor in tokens.items()}
        )
    return (query, *caches, index), {"softcap": softcap, "bits": bits, **tokens}, wanted


class Emulated:
    """A variant of the kernel, compiled for the CPU."""

    def __init__(self, macros, folder):
        here, pointers, numbers = Path(__file__).parent / "emulation", 26, 22
        library = folder / f"{abs(hash(macros))}.so"
        defined = [f"-D{name}={value}" for name, value in (*macros, ("POINTERS", pointers), ("NUMBERS", numbers))]
        subprocess.run(
            [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-mf16c", "-pthread", "-w", f"-I{here}", *defined,
             f"-I{cuda.SOURCE.parent}", str(here / "decode.cpp"), "-o", str(library)],
            check=True,
        )  # fmt: skip
        self.run, self.launched = ctypes.CDLL(str(library)).run, 0

    def launch(self, grid, threads, shared_bytes, arguments):
        """In the place of `_nvrtc.Kernel.launch`."""
        pointers = [value.data_ptr() for value in arguments if isinstance(value, torch.Tensor)]
        numbers = [value for value in arguments if type(value) is int]
        floats = [ctypes.c_float(value) for value in arguments if type(value) is float]
        packed = (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int * len(numbers))(*numbers)
        self.run(*grid[:2], *packed, *floats)
        self.launched += 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_on_a_cpu(case, monkeypatch, tmp_path):
    knobs = dict(CASES[case])
    blocks = knobs.pop("blocks", cuda.PROCESSORS)
    arguments, options, wanted = example(**knobs)
    kernels = []

    def compiled(macros, device):
        kernels.append(Emulated(macros, tmp_path))
        return kernels[-1]

    monkeypatch.setattr(cuda, "_kernel", compiled)
    monkeypatch.setattr(cuda, "is_hopper", lambda device: True)
    monkeypatch.setattr(cuda, "PROCESSORS", blocks)
    monkeypatch.setattr(_nvrtc, "available", lambda: True)
    monkeypatch.setattr(operation, "use_triton", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = decode_attention(*arguments, **options)
    assert [kernel.launched for kernel in kernels] == [1]
    assert relative_error(found, wanted) < TOLERANCE[found.dtype]


@pytest.mark.skipif(not _nvrtc.available(), reason="cuda-bindings is not installed")
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8, 12])
def test_the_kernel_compiles_without_spilling(bits, size, group):
    macros = {"SIZE": size, "GROUP": group, "BITS": bits, "BFLOAT": 1, "STARTS": 0, "EXTRA": 1, "CAPPED": 0,
              "ALONE": 0, "SHORTEST": 128, "WARPS": cuda.WARPS, "BLOCKS": cuda.blocks_of_processor(group)}  # fmt: skip
    for paged_ in (0, 1):
        assert _local_bytes(cuda.compile_cubin({**macros, "PAGED": paged_})) == 0


@on_hopper
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_on_a_gpu(case, monkeypatch):
    knobs = dict(CASES[case])
    monkeypatch.setattr(cuda, "PROCESSORS", knobs.pop("blocks", cuda.PROCESSORS))
    arguments, options, wanted = example(**knobs)
    query, full, streaming, index = arguments
    caches, tables = (full.tensors(), streaming.tensors()), [full.block_table, streaming.block_table]
    assert not cuda.obstacle(Call(query, *caches, [], [], tables, [], index, None, None, 1.0, 0.0, options["bits"]))
    with backend(""):
        found = decode_attention(*arguments, **options)
        assert relative_error(found, wanted) < TOLERANCE[found.dtype]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decode_attention(*arguments, **options)
        graph.replay()
        assert torch.equal(captured, found)


def test_what_the_kernel_does_not_run(monkeypatch):
    monkeypatch.setattr(cuda, "is_hopper", lambda device: True)
    monkeypatch.setattr(_nvrtc, "available", lambda: True)

    def obstacle(dtype=torch.float16, size=64, group=2, page=16, shift=0):
        buffer = torch.zeros(2 * page * size + shift, dtype=dtype)
        pages = buffer[shift:].view(2, 1, page, size)
        query, index = torch.zeros(1, group, 1, size, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        table = torch.zeros(1, 2, dtype=torch.int32)
        caches = [pages, pages], [pages[:, :0], pages[:, :0]]
        return cuda.obstacle(Call(query, *caches, [], [], [table, None], [], index, None, None, 1.0, 0.0, 16))

    assert not obstacle()
    assert "float32" in obstacle(dtype=torch.float32)
    assert "80 channels" in obstacle(size=80)
    assert "more than 16 query heads" in obstacle(group=17)
    assert "pages of 24 slots" in obstacle(page=24)
    assert "multiple of 16 bytes" in obstacle(shift=1)
