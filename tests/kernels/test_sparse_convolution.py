"""What `test_operations` does not show of sparse convolution: sorting, epilogues, bad input."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.sparse_convolution import CountedMap, Epilogue, sort_map, sparse_convolution
from pronghorn.kernels.sparse_convolution.cases import OPERATION, transposed
from pronghorn.kernels.sparse_convolution.sorting import bitmasks, reduced
from pronghorn.kernels.sparse_convolution.tiles import TILE

SHAPE = {"rows": 260, "sizes": (1, 9, 12, 7), "kernel_size": (3, 3, 3), "channels": 7, "columns": 5, "splits": 0}


def example(dtype=torch.float32, **changes):
    return OPERATION.example({**SHAPE, **changes}, dtype, torch.Generator().manual_seed(0), DEVICE)


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (2, 2, 1)])
def test_a_sorted_map_is_the_map(splits, kernel_size, which):
    found = example(kernel_size=kernel_size)["kernel_map"]
    with backend(which):
        ours = sort_map(found, splits=splits)
        masks = bitmasks(found, splits)
    width = ours.active.shape[2]
    for k, column in enumerate(ours.kernel_map):
        order = ours.order[k // width].long()
        assert torch.equal(column, found[k][order])
    for split in range(splits):
        order = ours.order[split].long()
        assert torch.equal(order.sort().values, torch.arange(found.shape[1], device=DEVICE))  # each once
        ordered = masks[split][order]
        assert torch.equal(ordered, ordered.sort(descending=True).values)
        for tile, (active, count) in enumerate(zip(ours.active[split], ours.counts[split], strict=True)):
            part = found[split * width : (split + 1) * width][:, order[tile * TILE : (tile + 1) * TILE]]
            wanted = (part >= 0).any(dim=1).nonzero()[:, 0].tolist()
            assert active[:count].tolist() == wanted
            assert set(active[count:].tolist()) <= {-1}
    assert torch.equal(
        reduced(masks, TILE)[0, 0], torch.tensor(_or(masks[0, :TILE].tolist()), dtype=torch.int32).to(DEVICE)
    )


def _or(numbers):
    result = 0
    for number in numbers:
        result |= number
    return result


def test_sorting_leaves_offsets_out():
    """Sites of two planes: sorted, half of the tiles have one plane's offsets alone."""
    found = torch.full((4, 4 * TILE), -1, dtype=torch.int32, device=DEVICE)
    found[:2, ::2], found[2:, 1::2] = 5, 6
    assert sort_map(found).counts[0].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("parts", ["scale", "shift", "residual", "relu", "all"])
def test_an_epilogue_is_what_comes_after(parts, splits, which):
    arguments = example(splits=splits)
    generator = torch.Generator().manual_seed(1)
    given = {
        "scale": torch.randn(5, generator=generator), "shift": torch.randn(5, generator=generator),
        "residual": torch.randn(len(arguments["x"]), 5, generator=generator), "relu": True,
    }  # fmt: skip
    given = {key: value if key == "relu" else value.to(DEVICE) for key, value in given.items() if parts in (key, "all")}
    with backend(which):
        plain = sparse_convolution(**arguments)
        found = sparse_convolution(**arguments, epilogue=Epilogue(**given))
    assert relative_error(found, Epilogue(**given)(plain)) < 1e-6


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("count", [260, 128, 3, 0])
def test_a_counted_map_is_the_map(count, which):
    """Of a map whose last outputs are none; tiles of them alone are not computed."""
    arguments = example(channels=17)
    found, there = arguments["kernel_map"].clone(), torch.tensor([count], dtype=torch.int32, device=DEVICE)
    found[:, count:] = -1
    back = transposed(found, found.shape[1])
    results = []
    for maps in ((found, back), (CountedMap(found, there), CountedMap(back, there.new_tensor([260])))):
        given = [arguments[name].clone().requires_grad_() for name in ("x", "weight")]
        with backend(which):
            y = sparse_convolution(*given, *maps)
            y.square().sum().backward()
        results.append([y, *[tensor.grad for tensor in given]])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_count_is_what_the_kernel_computes():
    arguments = example()
    found, count = arguments["kernel_map"], torch.tensor([1], dtype=torch.int32, device=DEVICE)
    with backend("triton"):
        y = sparse_convolution(arguments["x"], arguments["weight"], CountedMap(found, count))
    assert y[:10].abs().sum() > 0
    assert not y[-10:].any()


def test_bad_input_is_named():
    arguments = example()
    found = arguments["kernel_map"]
    with pytest.raises(ValueError, match="splits: got 0"):
        sort_map(found, splits=0)
    with pytest.raises(ValueError, match="splits: got 1, wanted 4"):
        sort_map(torch.zeros(125, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"epilogue\.scale"):
        sparse_convolution(**arguments, epilogue=Epilogue(scale=torch.ones(3, device=DEVICE)))
    with pytest.raises(TypeError, match="kernel_map: got"):
        sparse_convolution(arguments["x"], arguments["weight"], found.long())
    with pytest.raises(TypeError, match="weight: got"):
        sparse_convolution(arguments["x"], arguments["weight"].double(), found)
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="epilogue"):
        sparse_convolution(**arguments, epilogue=Epilogue(relu=True))
    with pytest.raises(RuntimeError, match="transposed_map"):
        sparse_convolution(arguments["x"], arguments["weight"], found).sum().backward()
