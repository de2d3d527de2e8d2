"""Tokens written as codes, and what is not written; plain caches are checked with all operations."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels.cache_append import cache_append
from pronghorn.kernels.decode_attention import CachedHeads
from pronghorn.kernels.kv_quantize import kv_quantize

INDEX, SIZES = [-1, 0, 1], {"sink_size": 2, "recent_size": 5}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def empty(heads, slots, bits, size=32):
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    if bits == 16:
        return CachedHeads(*torch.zeros(2, 2, heads, slots, size, device=DEVICE).unbind(), lengths)
    codes = torch.zeros(2, 2, heads, slots, size * bits // 8, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(4, 2, heads, slots, 1, dtype=torch.float16, device=DEVICE)
    return CachedHeads(codes[0], codes[1], lengths, None, None, *scales.unbind())


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_last_tokens_and_the_first_are_kept(bits, which):
    full, streaming = empty(2, 20, bits), empty(1, 7, bits)
    index = torch.tensor(INDEX, dtype=torch.int32, device=DEVICE)
    tokens = [(random(2, 3, 1, 32, seed=step), random(2, 3, 1, 32, seed=100 + step)) for step in range(16)]
    with backend(which):
        for key, value in tokens:
            cache_append(key, value, full, streaming, index, bits=bits, **SIZES)
    key, value = (torch.cat(parts, dim=2) for parts in zip(*tokens, strict=True))
    wanted = [key, value] if bits == 16 else [*kv_quantize(key, bits=bits), *kv_quantize(value, bits=bits)]
    ring = [0, 1, 12, 13, 14, 15, 11]  # tokens in slots 2 + (p - 2) mod 5
    for stored, part in zip(full.tensors(), wanted, strict=True):
        assert torch.equal(stored[:, :, :16], part[:, 1:])
        assert not stored[:, :, 16:].any()
    for stored, part in zip(streaming.tensors(), wanted, strict=True):
        assert torch.equal(stored, part[:, :1, ring])
    assert full.lengths.tolist() == streaming.lengths.tolist() == [16, 16]


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_nothing_is_written_beyond_the_capacity(which):
    full, streaming = empty(2, 3, 16), empty(1, 7, 16)
    index = torch.tensor(INDEX, dtype=torch.int32, device=DEVICE)
    full.lengths[0] = 3
    with backend(which):
        cache_append(random(2, 3, 1, 32), random(2, 3, 1, 32), full, streaming, index, **SIZES)
    assert not full.key[0].any()
    assert full.key[1, :, 0].all()


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: a | {"key": a["key"].expand(-1, -1, 2, -1)}, "key"),
    (lambda a: a | {"value": a["value"][:1]}, "value"),
    (lambda a: a | {"head_index": a["head_index"][:2]}, "head_index"),
    (lambda a: a | {"recent_size": 0}, "recent_size"),
    (lambda a: a | {"recent_size": 4}, "sink_size"),
    (lambda a: a | {"bits": 4}, "full.key"),
    (lambda a: a | {"full": a["full"]._replace(block_table=a["head_index"][None])}, "block_table"),
])  # fmt: skip
def test_bad_arguments_are_refused(change, message):
    arguments = {
        "key": random(2, 3, 1, 32), "value": random(2, 3, 1, 32), "full": empty(2, 20, 16),
        "streaming": empty(1, 7, 16), "head_index": torch.tensor(INDEX, dtype=torch.int32, device=DEVICE), **SIZES,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        cache_append(**change(arguments))
