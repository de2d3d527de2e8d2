"""Decoding with DuoAttention's static cache as CUDA graphs; without a GPU, replaying is running again."""

import pytest
import torch
from tests.models import token_ids
from tests.plugins.duoattention.conftest import duo_of, small

from pronghorn.duoattention.bench import measure
from pronghorn.transformers import graphs
from pronghorn.transformers.graphs import GraphedForward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def captures(monkeypatch):
    made, original = [], graphs.captured

    def counted(run):
        made.append(run)
        return original(run) if DEVICE == "cuda" else run

    monkeypatch.setattr(graphs, "captured", counted)
    return made


def generate(model, duo, ids, mask, cache=None, tokens=20, **options):
    cache = cache or duo.make_cache(static=True, max_len=64)
    return model.generate(
        ids.to(DEVICE), attention_mask=mask.to(DEVICE), past_key_values=cache, max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, pad_token_id=0, disable_compile=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}, {"decode_window": "mask"}], ids=str)
def test_generate_gives_the_same_tokens(captures, options, padding):
    model = small("llama").to(DEVICE)
    duo, ids = duo_of(model, **options), token_ids(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    wanted = generate(model, duo, ids, mask)
    with GraphedForward(model):
        for _ in range(2):
            assert torch.equal(generate(model, duo, ids, mask), wanted)
        assert model.config._attn_implementation == "duo"
    assert len(captures) == 2  # one for each cache
    assert torch.equal(generate(model, duo, ids, mask), wanted)


def test_a_cache_that_is_used_again_keeps_its_graph(captures):
    model = small("llama").to(DEVICE)
    duo, ids = duo_of(model), token_ids(1, 17)
    mask = torch.ones_like(ids)
    wanted = generate(model, duo, ids, mask)
    cache = duo.make_cache(static=True, max_len=64)
    with GraphedForward(model):
        for _ in range(3):
            assert torch.equal(generate(model, duo, ids, mask, cache), wanted)
            cache.reset()
    assert len(captures) == 1


def test_a_follow_up_reads_what_graphs_have_written(captures):
    model = small("llama").to(DEVICE)
    duo, ids = duo_of(model), token_ids(1, 17)
    plain, graphed = (duo.make_cache(static=True, max_len=64) for _ in range(2))
    answer = generate(model, duo, ids, torch.ones_like(ids), plain, tokens=8)
    more = torch.cat([answer, token_ids(1, 9, seed=1).to(DEVICE)], dim=1)
    wanted = generate(model, duo, more, torch.ones_like(more), plain, tokens=8)
    with GraphedForward(model):
        generate(model, duo, ids, torch.ones_like(ids), graphed, tokens=8)
        assert torch.equal(generate(model, duo, more, torch.ones_like(more), graphed, tokens=8), wanted)
    assert len(captures) == 1


def test_beam_search_runs_without(captures):
    model = small("llama").to(DEVICE)
    duo, ids = duo_of(model), token_ids(1, 17)
    wanted = generate(model, duo, ids, torch.ones_like(ids), num_beams=3)
    with GraphedForward(model):
        assert torch.equal(generate(model, duo, ids, torch.ones_like(ids), num_beams=3), wanted)
    assert not captures


def test_a_cache_whose_memory_changed_gets_another_graph(captures):
    """Padding is part of what a graph reads."""
    model = small("llama").to(DEVICE)
    duo, ids = duo_of(model), token_ids(2, 17)
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][0, :5] = 0
    wanted = [generate(model, duo, ids, mask) for mask in masks]
    cache = duo.make_cache(static=True, max_len=64)
    with GraphedForward(model) as forward:
        for mask, answer in zip(masks, wanted, strict=True):
            assert torch.equal(generate(model, duo, ids, mask, cache), answer)
            cache.reset()
        assert len(captures) == 2
        assert len(forward._steps) == 1


def test_bench_decodes_with_graphs(captures):
    model = small("llama").to(DEVICE)
    duo = duo_of(model)
    speed = measure(
        model, lambda room: duo.make_cache(static=True, max_len=room), 40, prefill_chunk_size=16, decode_steps=5,
        graphs=True,
    )  # fmt: skip
    assert len(captures) == 1
    assert speed.decode_seconds > 0


def test_replayed_steps_notice_that_there_is_no_room(captures):
    model = small("llama").to(DEVICE)
    duo, ids = duo_of(model), token_ids(1, 17)
    cache = duo.make_cache(static=True, max_len=24)
    with GraphedForward(model), pytest.raises(ValueError, match="24 tokens are stored and 1 more"):
        generate(model, duo, ids, torch.ones_like(ids), cache, tokens=12)
    assert len(captures) == 1
