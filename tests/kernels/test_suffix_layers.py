"""An action expert's layers: what is refused, its machine code, and its CUDA kernels on a Hopper GPU."""

import re

import pytest
import torch
from tests.kernels.harness import DEVICE, backend
from tests.kernels.test_fragments import _local_bytes

from pronghorn.kernels import _nvrtc
from pronghorn.kernels._hopper import CAPABILITY
from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.suffix_layers import cuda, runs_fused, suffix_layers
from pronghorn.kernels.suffix_layers.cases import OPERATION

PUBLISHED = OPERATION.large
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY, reason="no Hopper GPU"
)


def example(dtype=torch.float32, seed=0, **knobs):
    shape = {**OPERATION.shapes[0], **knobs}
    return OPERATION.example(shape, dtype, torch.Generator().manual_seed(seed), DEVICE)


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers: got none"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"prefix_mask": torch.zeros(12)}, "prefix_mask: got torch.float32"),
        ({"prefix_mask": torch.zeros(11, dtype=torch.bool)}, r"layers\[0\].key: got shape \(12, 8\)"),
        ({"cos": torch.zeros(5, 7)}, "cos: got 7 channels"),
        ({"sin": torch.zeros(5, 6)}, "sin: got shape"),
        ({"cos": torch.zeros(5, 8).half()}, "cos: got torch.float16"),
        ({"x": torch.zeros(1, 5, 16)}, "x: got shape"),
    ],
)
def test_refuses(change, message):
    arguments = example()
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        suffix_layers(**{**arguments, **moved})


@pytest.mark.fault(5)
@pytest.mark.parametrize("field", ["qkv", "out", "gate_up", "down", "scale", "late_gate", "key", "value"])
def test_refuses_a_layer(field):
    arguments = example()
    wrong = getattr(arguments["layers"][1], field)[:-1]
    arguments["layers"][1] = arguments["layers"][1]._replace(**{field: wrong})
    with pytest.raises(ValueError, match=rf"layers\[1\].{field}: got shape"):
        suffix_layers(**arguments)
    arguments["layers"][1] = arguments["layers"][0]._replace(**{field: getattr(arguments["layers"][0], field).half()})
    with pytest.raises(TypeError, match=rf"layers\[1\].{field}: got torch.float16"):
        suffix_layers(**arguments)


@pytest.mark.fault(5)
def test_what_is_masked_out_is_not_seen():
    arguments = example(absent=0.5)
    wanted = suffix_layers(**arguments)
    for layer in arguments["layers"]:
        layer.key[~arguments["prefix_mask"]] = 100.0
        layer.value[~arguments["prefix_mask"]] = 100.0
    assert torch.equal(suffix_layers(**arguments), wanted)


@pytest.mark.fault(5)
def test_layers_one_by_one_are_the_same():
    arguments = example()
    x = arguments["x"]
    for layer in arguments["layers"]:
        x = suffix_layers(**{**arguments, "x": x, "layers": [layer]})
    assert torch.equal(x, suffix_layers(**arguments))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="has a GPU")
def test_says_why_it_is_not_fused():
    arguments = example()
    assert not runs_fused(arguments["x"], arguments["layers"][0])
    assert cuda.obstacle(arguments["x"], arguments["layers"][0]) == "the device is no Hopper GPU"


@pytest.mark.skipif(not _nvrtc.available(), reason="cuda-bindings is not installed")
@pytest.mark.parametrize("variant", cuda.variants(PUBLISHED["heads"], PUBLISHED["width"], PUBLISHED["inner"]), ids=str)
def test_keeps_everything_in_registers(variant):
    assert _local_bytes(cuda.compile_cubin(variant)) == 0


@pytest.mark.skipif(not _nvrtc.available(), reason="cuda-bindings is not installed")
@pytest.mark.parametrize("prefix", [1, 600, 800])
def test_launches_fit_the_sources(monkeypatch, prefix):
    """Kernels get arguments of the sizes that they declare, and grids of whole clusters."""
    launches = []

    class Recorder:
        def __init__(self, variant):
            self.variant = variant

        def launch(self, grid, threads, shared_bytes, arguments, ahead=False):
            launches.append((self.variant, grid, shared_bytes, arguments, ahead))

    monkeypatch.setattr(cuda, "_kernel", lambda variant, device: Recorder(variant))
    monkeypatch.setattr(cuda, "index_of", lambda x: 0)
    monkeypatch.setattr(_nvrtc, "tensor_map", lambda x, box: MAP)
    arguments = example(torch.bfloat16, **{**PUBLISHED, "layers": 1, "prefix": prefix})
    tensors = [tensor for layer in arguments["layers"] for tensor in layer]
    cuda.suffix_layers(*(arguments["x"], tensors, *(arguments[name] for name in ("prefix_mask", "cos", "sin", "eps"))))
    assert [ahead for *_, ahead in launches] == [False, True, True, True, True, True]
    for variant, grid, shared_bytes, given, _ in launches:
        assert shared_bytes <= cuda.SHARED_BYTES
        assert grid[0] % dict(variant.macros)["SPLIT"] == 0
        assert _parameter_bytes(cuda.compile_cubin(variant)) == [_bytes_of(value) for value in given]


MAP = object()


def _bytes_of(value):
    return 128 if value is MAP else 8 if isinstance(value, torch.Tensor) else 4


def _parameter_bytes(cubin):
    """Sizes of a kernel's parameters, which its ELF attributes EIATTR_KPARAM_INFO (0x17) note in any order."""
    found = re.findall(rb"\x04\x17\x0c\x00\x00{4}(..)..(....)", cubin, re.DOTALL)
    sizes = {int.from_bytes(at, "little"): int.from_bytes(word, "little") >> 18 for at, word in found}
    return [sizes[at] for at in sorted(sizes)]


@pytest.mark.parametrize(("length", "keys"), [(1, 96), (572, 96), (672, 96), (673, 128), (896, 128)])
def test_tiles_hold_the_prefix(length, keys):
    assert cuda.attention(length).keys == keys


@on_hopper
@pytest.mark.parametrize("knobs", [shape for shape in OPERATION.shapes if shape["width"] == PUBLISHED["width"]])
@pytest.mark.parametrize("tokens", [1, 17, 50, 63])
@pytest.mark.parametrize("prefix", [1, 448, 572, 672, 673, 828, 896])
def test_cuda_kernels(knobs, tokens, prefix):
    arguments = example(torch.bfloat16, **{**knobs, "tokens": tokens, "prefix": prefix})
    assert runs_fused(arguments["x"], arguments["layers"][0])
    result, wanted = suffix_layers(**arguments), OPERATION.oracle(arguments)
    with backend("reference"):
        reference = suffix_layers(**arguments)
    assert relative_error(result, wanted) <= max(1.5 * relative_error(reference, wanted), 1e-3)
    assert torch.equal(suffix_layers(**arguments), result)


@on_hopper
def test_cuda_kernels_in_a_graph():
    arguments = example(torch.bfloat16, **{**PUBLISHED, "layers": 3})
    wanted = suffix_layers(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = suffix_layers(**arguments)
    for _ in range(20):
        result.zero_()
        graph.replay()
        assert torch.equal(result, wanted)
