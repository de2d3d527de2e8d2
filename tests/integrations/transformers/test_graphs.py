"""Steps that are captured as CUDA graphs give what they give without; here captured steps are functions run again."""

import logging

import pytest
import torch
from tests.models import tiny_model, token_ids
from torch._dynamo.utils import counters
from transformers import StaticCache

from pronghorn.transformers import graphs
from pronghorn.transformers.graphs import GraphedForward

CUDA = torch.cuda.is_available()
HOW = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static", "disable_compile": True}


@pytest.fixture
def captures(monkeypatch):
    """Counts captures; without a GPU, replaying is running again."""
    made = []
    original = graphs.captured

    def counted(run):
        made.append(run)
        return original(run) if CUDA else run

    monkeypatch.setattr(graphs, "captured", counted)
    return made


@pytest.fixture
def model():
    return tiny_model("llama").to("cuda" if CUDA else "cpu")


@pytest.fixture
def graphed(model, captures):
    forward = GraphedForward(model)
    forward.install()
    yield forward
    forward.remove()
    assert "forward" not in vars(model)


def generate(model, ids, mask=None, **how):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **{**HOW, **how})


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("longest", [1024, 16])
def test_generate_gives_the_same_tokens(model, captures, monkeypatch, tokens, longest):
    monkeypatch.setattr(graphs, "LARGEST_CHUNK", 16)
    monkeypatch.setattr(graphs, "LONGEST_IN_CHUNKS", longest)
    ids = token_ids(2, tokens)
    mask = torch.ones_like(ids)
    mask[0, : tokens // 3] = 0
    wanted = generate(model, ids, mask, max_new_tokens=12)
    forward = GraphedForward(model)
    forward.install()
    for _ in range(3):
        assert torch.equal(generate(model, ids, mask, max_new_tokens=12), wanted)
    sizes = {size for state in [forward._released] for size in state.graphs}
    forward.remove()
    assert sizes == ({1} if tokens > longest or tokens == 1 else {1, 16})
    assert len(captures) == len(sizes)  # the second cache takes over the memory of the first, and its graphs


def test_few_compilations_serve_all_sizes(model, captures, monkeypatch):
    ids = token_ids(1, 40)
    wanted = generate(model, ids, max_new_tokens=6)
    compiled, original = [], torch.compile
    torch._dynamo.reset()
    counters.clear()  # of what others compiled

    def noted(function, **options):
        compiled.append(options)
        return original(function, **options, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", noted)
    forward = GraphedForward(model, compile=True)
    forward.install()
    for tokens in (40, 40, 20, 20, 9, 9):
        result = generate(model, ids[:, :tokens], max_new_tokens=6)
        if tokens == 40:
            assert torch.equal(result, wanted)
    forward.remove()
    assert len(compiled) == 1
    assert counters["stats"]["unique_graphs"] == 2  # one token, and more
    assert len(captures) > 2


def test_a_follow_up_continues_a_kept_cache(model, graphed, captures):
    ids = token_ids(1, 50).to(model.device)
    with torch.no_grad():
        wanted = graphed._eager(ids).logits[:, -1:]
    cache = StaticCache(config=model.config, max_cache_len=64)
    how = {"past_key_values": cache, "use_cache": True, "return_dict": True, "logits_to_keep": 1}
    with torch.no_grad():
        for part in (ids[:, :20], ids[:, 20:43], ids[:, 43:49], ids[:, 49:]):
            logits = model(input_ids=part, **how).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length()) == 50
    assert len(captures) == 3  # 32 and 16 tokens, and one; the first part fills the cache as it is


def test_where_there_is_no_room_to_fill_up(model, graphed):
    ids = token_ids(1, 40).to(model.device)
    with torch.no_grad():
        wanted = graphed._eager(ids).logits[:, -1:]
    cache = StaticCache(config=model.config, max_cache_len=40)
    how = {"past_key_values": cache, "use_cache": True, "return_dict": True, "logits_to_keep": 1}
    with torch.no_grad():
        model(input_ids=ids[:, :20], **how)
        logits = model(input_ids=ids[:, 20:], **how).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_beam_search_runs_without(model, captures):
    ids = token_ids(2, 9)
    wanted = generate(model, ids, max_new_tokens=8, num_beams=3)
    forward = GraphedForward(model)
    forward.install()
    assert torch.equal(generate(model, ids, max_new_tokens=8, num_beams=3), wanted)
    forward.remove()


def test_other_calls_run_as_before(model, graphed, captures):
    ids = token_ids(2, 9).to(model.device)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, graphed._eager(ids).logits)
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=hidden).logits.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert not captures


def test_what_cannot_be_captured_runs_without(model, monkeypatch, caplog):
    ids = token_ids(1, 9)
    wanted = generate(model, ids, max_new_tokens=8)

    def refusing(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", refusing)
    forward = GraphedForward(model)
    forward.install()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, ids, max_new_tokens=8), wanted)
        assert torch.equal(generate(model, ids, max_new_tokens=8), wanted)
    forward.remove()
    assert caplog.text.count("runs without CUDA graphs: operation not permitted") == 1


def test_other_errors_are_not_hidden(model, monkeypatch):
    def failing(run):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "captured", failing)
    forward = GraphedForward(model)
    forward.install()
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, token_ids(1, 9), max_new_tokens=8)
    forward.remove()
