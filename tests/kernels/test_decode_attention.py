"""Decoding over codes and pages, and with a soft cap; plain caches are checked with all operations."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.decode_attention import CachedHeads, decode_attention
from pronghorn.kernels.decode_attention.cases import OPERATION
from pronghorn.kernels.kv_quantize import kv_dequantize, kv_quantize

INDEX, SIZE = [-1, 0, 1], 32


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def example(lengths=(150, 90), window=20, dtype=torch.float32, start=None, size=SIZE):
    batch = len(lengths)
    caches = []
    for count, capacity, filled in ((2, 200, lengths), (1, window, [window] * batch)):
        key, value = (random(batch, count, capacity, size, dtype=dtype, seed=seed) for seed in (1, 2))
        length = torch.tensor(filled, dtype=torch.int32, device=DEVICE)
        caches.append(CachedHeads(key, value, length, None if start is None else length.new_tensor(start)))
    index = torch.tensor(INDEX, dtype=torch.int32, device=DEVICE)
    return random(batch, 6, 1, size, dtype=dtype), *caches, index


def coded(cache, bits):
    key, value = kv_quantize(cache.key, bits=bits), kv_quantize(cache.value, bits=bits)
    return CachedHeads(
        key[0], value[0], cache.lengths, cache.start, cache.block_table, key[1], key[2], value[1], value[2]
    )


def decoded(cache, bits, dtype):
    return CachedHeads(
        kv_dequantize(cache.key, cache.key_scale, cache.key_zero, bits=bits, dtype=dtype),
        kv_dequantize(cache.value, cache.value_scale, cache.value_zero, bits=bits, dtype=dtype),
        cache.lengths, cache.start,
    )  # fmt: skip


def paged(cache, page_size):
    """The same content in pages that lie in any order, among others that hold no numbers."""
    batch, _, capacity, _ = cache.key.shape
    pages = -(-capacity // page_size)
    order = torch.randperm(3 * batch * pages, generator=torch.Generator().manual_seed(0))[: batch * pages]
    table = order.view(batch, pages).to(DEVICE)

    def spread(tensor):
        fill = float("nan") if tensor.is_floating_point() else 255
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, pages * page_size - capacity))
        chunks = padded.unflatten(2, (pages, page_size)).transpose(1, 2)
        result = torch.full((3 * batch * pages, *chunks.shape[2:]), fill, dtype=tensor.dtype, device=DEVICE)
        result[table.flatten()] = chunks.flatten(0, 1)
        return result

    tensors = {
        name: None if getattr(cache, name) is None else spread(getattr(cache, name))
        for name in ("key", "value", "key_scale", "key_zero", "value_scale", "value_zero")
    }
    return cache._replace(**tensors, block_table=table.to(torch.int32))


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 80])
@pytest.mark.parametrize("extra", [False, True])
def test_codes_are_what_they_stand_for(bits, which, extra, size):
    query, full, streaming, index = example(start=(0, 7), size=size)
    full, streaming = coded(full, bits), coded(streaming, bits)
    token = {"key": random(2, 3, 1, size, seed=3), "value": random(2, 3, 1, size, seed=4)} if extra else {}
    wanted = decode_attention(
        query.double(), *(decoded(cache, bits, torch.float64) for cache in (full, streaming)), index,
        **{name: tensor.double() for name, tensor in token.items()},
    )  # fmt: skip
    with backend(which):
        assert relative_error(decode_attention(query, full, streaming, index, bits=bits, **token), wanted) < 1e-5


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kinds", ["both", "one"])
def test_pages_are_what_they_hold(bits, which, kinds):
    query, full, streaming, index = example()
    if bits == 4:
        full, streaming = coded(full, bits), coded(streaming, bits)
    with backend(which):
        wanted = decode_attention(query, full, streaming, index, bits=bits)
        streams = paged(streaming, 16) if kinds == "both" else streaming
        assert relative_error(decode_attention(query, paged(full, 32), streams, index, bits=bits), wanted) < 1e-6


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("window", [(20, 50), (0, 33), (16, 1), (70, 70), (90, 5), (140, 80)])
@pytest.mark.parametrize("start", [None, (3, 40), (95, 0)])
@pytest.mark.parametrize("pages", [False, True])
def test_only_sink_and_recent_slots_are_seen(window, start, pages, which):
    query, full, streaming, index = example(start=start)
    slot, length = torch.arange(full.key.shape[2], device=DEVICE), full.lengths[:, None]
    seen = (slot < length) & ((slot < window[0]) | (slot >= length - window[1]))
    if start is not None:
        seen &= slot >= full.start[:, None]
    scores = query.unflatten(1, (3, 2))[:, 1:, :, 0] @ full.key.mT * SIZE**-0.5
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    full = full._replace(sink_size=window[0], recent_size=window[1])
    with backend(which):
        found = decode_attention(query, paged(full, 32) if pages else full, streaming, index)
    assert relative_error(found.unflatten(1, (3, 2))[:, 1:, :, 0], weights @ full.value) < 1e-5


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_a_soft_cap_bounds_the_scores(which):
    query, full, streaming, index = example()
    token = {"key": random(2, 3, 1, SIZE, seed=3), "value": random(2, 3, 1, SIZE, seed=4)}
    keys, values = (
        torch.cat([full.key[:, 0], token["key"][:, 1]], 1),
        torch.cat([full.value[:, 0], token["value"][:, 1]], 1),
    )
    scores = (20 * query.unflatten(1, (3, 2)))[:, 1, 0] @ keys.mT * SIZE**-0.5
    unseen = torch.arange(201, device=DEVICE) >= full.lengths[:, None, None]
    unseen[..., 200] = False
    wanted = (5 * torch.tanh(scores / 5)).masked_fill(unseen, -torch.inf).softmax(-1) @ values
    with backend(which):
        found = decode_attention(20 * query, full, streaming, index, softcap=5.0, **token)
    assert relative_error(found.unflatten(1, (3, 2))[:, 1, 0], wanted) < 1e-5


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_what_is_not_seen_may_be_anything(which):
    query, full, streaming, index = example(start=(0, 7))
    with backend(which):
        wanted = decode_attention(query, full, streaming, index)
        for cache in (full, streaming):
            for row, (length, start) in enumerate(zip(cache.lengths.tolist(), cache.start.tolist(), strict=True)):
                for tensor in (cache.key, cache.value):
                    tensor[row, :, length:] = float("nan")
                    tensor[row, :, :start] = float("nan")
        assert torch.equal(decode_attention(query, full, streaming, index), wanted)


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_nothing_seen_is_zero(which):
    query, full, streaming, index = example(lengths=(0, 3))
    with backend(which):
        result = decode_attention(query, full, streaming, index).unflatten(1, (3, 2))
        assert (result[0, 1:] == 0).all()
        assert (result[1] != 0).any()
        none = CachedHeads(full.key[:, :, :0], full.value[:, :, :0], full.lengths * 0)
        assert (decode_attention(query, none, streaming, index).unflatten(1, (3, 2))[:, 1:] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_in_pages_are_one_operation(bits):
    query, full, streaming, index = example(lengths=(9, 5))
    full, streaming = paged(coded(full, bits), 16), paged(coded(streaming, bits), 16)
    with backend("reference"):
        torch.library.opcheck(
            torch.ops.pronghorn.decode_attention,
            (query, full.tensors(), streaming.tensors(), [full.lengths, streaming.lengths], [None, None],
             [full.block_table, streaming.block_table], [0, -1, 0, -1], index, None, None, 0.1, 0.0, bits),
        )  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: a | {"query": a["query"].expand(-1, -1, 2, -1)}, "query"),
    (lambda a: a | {"head_index": a["head_index"].long()}, "head_index"),
    (lambda a: a | {"head_index": a["head_index"][:1]}, "head_index"),
    (lambda a: a | {"bits": 5}, "bits"),
    (lambda a: a | {"bits": 8}, "full.key"),
    (lambda a: a | {"softcap": -1.0}, "softcap"),
    (lambda a: a | {"full": a["full"]._replace(value=a["full"].value[:, :, 1:])}, "full.value"),
    (lambda a: a | {"streaming": a["streaming"]._replace(lengths=a["full"].lengths.long())}, "streaming.lengths"),
    (lambda a: a | {"streaming": a["streaming"]._replace(key_scale=a["full"].key)}, "streaming.key_scale"),
    (lambda a: a | {"full": a["full"]._replace(sink_size=-1)}, "full.sink_size"),
    (lambda a: a | {"full": a["full"]._replace(recent_size=0)}, "full.recent_size"),
    (lambda a: a | {"key": a["query"][:, :1]}, "key, value"),
    (lambda a: a | {"key": a["query"][:, :1], "value": a["query"][:, :1]}, "key"),
])  # fmt: skip
def test_bad_arguments_are_refused(change, message):
    arguments = OPERATION.example(OPERATION.shapes[0], torch.float32, torch.Generator().manual_seed(0), DEVICE)
    arguments = change({name: value for name, value in arguments.items() if name not in ("key", "value")})
    with pytest.raises((ValueError, TypeError), match=message):
        decode_attention(**arguments)
