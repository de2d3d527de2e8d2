"""Operations on tensors whose places do not fit into 32 bits, and with more blocks than a grid has in y or z."""

import pytest
import torch

from pronghorn.kernels._operation import operations, relative_error
from pronghorn.kernels.cache_write import cache_write
from pronghorn.kernels.cached_attention import cached_attention
from pronghorn.kernels.fetch_on_demand import fetch_on_demand
from pronghorn.kernels.sparse_convolution import sparse_convolution

OPERATIONS = {operation.name: operation for operation in operations()}
GIB = 2**30
# Knobs of an example of more than 2^31 elements, and the GPU memory that it takes with its results, in GiB.
BEYOND_32_BITS = {
    "adaptive_rms_norm": ({"rows": (1 << 16,), "tokens": 33, "channels": 1024, "added": False}, 26),
    "gated_mix": ({"batch": 17, "gates": 4, "group": 2, "tokens": 1 << 17, "size": 128}, 26),
    "geglu": ({"rows": (1 << 20, 17), "width": 128}, 26),
    "kv_quantize": ({"shape": (17, 8, 1 << 17, 128), "bits": 4, "group_size": 128}, 26),
    "rotary_embedding": ({"batch": 17, "tokens": 1 << 17, "heads": 8, "cached": 1, "size": 128}, 26),
}
MANY = 70_000  # of a batch: more than 65,535
GRID = {
    "cached_attention": {"cached": 1, "group": 1, "tokens": 1, "capacity": 16, "filled": 9, "size": 16},
    "decode_attention": {
        "index": (0,), "group": 1, "size": 128, "capacity": 4, "filled": (3,) * MANY, "window": 2
    },
    "gated_depthwise_conv": {"channels": 1, "height": 2, "width": 2, "channels_last": False, "biased": True},
    "gated_mix": {"gates": 1, "group": 1, "tokens": 1, "size": 8},
    "head_sparse_attention": {
        "types": (0,), "groups": 1, "tokens": 1, "length": 1, "size": 16, "sink": 1, "recent": 1
    },
    "relu_linear_attention": {"heads": 1, "tokens": 2, "size": 16, "channels_first": False},
    "rotary_embedding": {"tokens": 1, "heads": 1, "cached": 1, "size": 16},
    "shuffle_shortcut": {
        "up": False, "given": 2, "channels": 4, "coarse": (1, 1), "factor": 2, "shuffled": True, "channels_last": False
    },
}  # fmt: skip
ROWS, WIDTH = (1 << 24) + 64, 128  # of a tensor of more than 2^31 elements

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.fault(5),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def needs(gib):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"takes {gib} GiB of the GPU's memory, {free / GIB:.0f} are free")


def on_gpu(name, knobs):
    operation = OPERATIONS[name]
    return operation, operation.example(knobs, torch.float16, torch.Generator().manual_seed(0), torch.device("cuda"))


def rows_of(rows):
    """A few filled rows at the end of a tensor of zeros, and all of it."""
    last = torch.randn(rows, WIDTH, dtype=torch.float16, device="cuda")
    whole = torch.zeros(ROWS, WIDTH, dtype=torch.float16, device="cuda")
    whole[-rows:] = last
    assert whole.numel() > 2**31
    return last, whole


@pytest.mark.parametrize("name", BEYOND_32_BITS)
def test_the_last_row_is_what_it_is_alone(name):
    knobs, gib = BEYOND_32_BITS[name]
    needs(gib)
    operation, arguments = on_gpu(name, knobs)
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    assert max(tensor.numel() for tensor in tensors.values()) > 2**31
    rows = max(tensor.shape[0] for tensor in tensors.values() if tensor.dim() > 1)
    alone = {key: tensor[-1:].clone() for key, tensor in tensors.items() if tensor.shape[0] == rows}
    whole, part = operation.timed(**arguments), operation.timed(**{**arguments, **alone})
    whole, part = (found[0] if isinstance(found, tuple) else found for found in (whole, part))
    assert torch.equal(whole[-1:], part)


def test_cache_write_beyond_32_bits():
    needs(10)
    key, cache = rows_of(8)
    slots = torch.arange(ROWS - 8, ROWS, device="cuda")
    cache.zero_()
    paged = cache.view(ROWS, 1, 1, WIDTH)
    cache_write(key[:, None], key[:, None, :1], paged, torch.zeros_like(paged[..., :1]), slots)
    assert torch.equal(cache[-8:], key)


def test_cached_attention_beyond_32_bits():
    """All but the last slots are out of sight."""
    needs(20)
    few, keys = rows_of(64)
    query = torch.randn(1, 1, 1, WIDTH, dtype=torch.float16, device="cuda")
    mask = torch.zeros(1, 1, 1, ROWS, dtype=torch.bool, device="cuda")
    mask[..., -64:] = True
    found = cached_attention(query, keys[None, None], keys[None, None], mask)
    wanted = cached_attention(query, few[None, None], few[None, None], mask[..., -64:])
    assert relative_error(found, wanted) <= OPERATIONS["cached_attention"].tolerance[torch.float16]


def test_fetch_on_demand_beyond_32_bits():
    needs(10)
    few, x = rows_of(32)
    weight = torch.randn(1, WIDTH, 16, dtype=torch.float16, device="cuda")
    to = torch.arange(32, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 32], dtype=torch.int32, device="cuda")
    found = fetch_on_demand(x, weight, torch.stack([to + (ROWS - 32), to]), starts, 32)
    assert torch.equal(found, fetch_on_demand(few, weight, torch.stack([to, to]), starts, 32))


def test_sparse_convolution_beyond_32_bits():
    needs(10)
    few, x = rows_of(32)
    weight = torch.randn(1, WIDTH, 16, dtype=torch.float16, device="cuda")
    rows = torch.arange(32, dtype=torch.int32, device="cuda")[None]
    found = sparse_convolution(x, weight, rows + (ROWS - 32))
    assert torch.equal(found, sparse_convolution(few, weight, rows))


@pytest.mark.parametrize("name", GRID)
def test_more_blocks_than_a_grid_has_in_y_or_z(name):
    operation, arguments = on_gpu(name, {"batch": MANY, **GRID[name]})
    error = relative_error(operation.function(**arguments), operation.oracle(arguments))
    assert error <= operation.tolerance[torch.float16]
