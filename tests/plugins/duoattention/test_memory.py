"""The plan of the caches' memory; that it is the real tensors' is tested with the caches."""

import pytest
from transformers import LlamaConfig

from pronghorn.duoattention import DuoAttentionConfig, plan

LLAMA_3 = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
PATTERN = "Llama-3-8B-Instruct-Gradient-1048k"
GIB = 2**30


def test_half_the_heads_take_half_the_memory_in_the_limit():
    config = DuoAttentionConfig.from_pattern(PATTERN, sparsity=0.5, sink_size=128, recent_size=256)
    found = plan(LLAMA_3, config, context=1_048_576)
    assert found.full_bytes == 128 * GIB
    assert found.full_bytes / found.cache_bytes == pytest.approx(2, rel=1e-3)
    assert 0.5 < found.kept < 0.501
    short = plan(LLAMA_3, config, context=300)
    assert short.cache_bytes == short.full_bytes  # what is short is kept whole
    assert "GiB" in str(found)


def test_four_bits_and_half_the_heads_as_in_the_paper_s_demo():
    config = DuoAttentionConfig.from_pattern(PATTERN, sparsity=0.5, kv_bits=4)
    found = plan(LLAMA_3, config, context=3_300_000)
    assert found.cache_bytes == pytest.approx(32 * 4 * 3.3e6 * 2 * 68, rel=1e-3)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("budget", [1000, 3 * 2**20, 7 * GIB])
def test_the_largest_context_fits_and_one_more_does_not(bits, budget):
    config = DuoAttentionConfig.from_pattern(PATTERN, kv_bits=bits)
    largest = plan(LLAMA_3, config, context=1, batch_size=2, budget_bytes=budget).largest_context
    assert plan(LLAMA_3, config, context=largest + 1, batch_size=2).cache_bytes > budget
    assert largest == 0 or plan(LLAMA_3, config, context=largest, batch_size=2).cache_bytes <= budget


def test_streaming_heads_alone_have_no_limit():
    config = DuoAttentionConfig.from_pattern(PATTERN, sparsity=1.0)
    assert plan(LLAMA_3, config, context=10, budget_bytes=GIB).largest_context is None


@pytest.mark.parametrize(("options", "name"), [({"context": 0}, "context"), ({"batch_size": 0}, "batch_size"),
                                               ({"budget_bytes": -1}, "budget_bytes")])  # fmt: skip
def test_what_cannot_be_planned(options, name):
    with pytest.raises(ValueError, match=name):
        plan(LLAMA_3, DuoAttentionConfig(), **{"context": 5, **options})
    with pytest.raises(ValueError, match="gates"):
        plan(LLAMA_3, DuoAttentionConfig(gates=[[1.0]]), context=5)
