"""DuoAttention in transformers: caches, chunks, batches, and what generation does to them."""

import copy

import pytest
import torch
from tests.models import token_ids
from tests.plugins.duoattention.conftest import MIXED, RECENT, SINK, duo_of, run, small
from transformers import DynamicCache

from pronghorn.duoattention import DuoAttentionConfig, apply_duo, plan
from pronghorn.duoattention.bench import cache_bytes
from pronghorn.duoattention.transformers import cache as cache_module
from pronghorn.duoattention.transformers.cache import DuoLayer
from pronghorn.kernels._operation import relative_error

FAMILIES = ["llama", "llama_mha", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3",
            "phi3", "cohere", "gpt_neox", "opt"]  # fmt: skip
CALLS = [[40], [23, 1, 1, 15], [1, 39], [17, 20, 1, 1, 1]]


def ones(model):
    config = model.config
    return [[1.0] * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)] * 2


def cache_of(duo, static, tokens=40):
    return duo.make_cache(static=static, max_len=tokens if static else None)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_full_is_the_model_as_it_is(family, static):
    model = small(family)
    ids = token_ids(2, 40)
    with torch.no_grad():
        wanted = model(ids).logits
    duo = duo_of(model, ones(model))
    for calls in CALLS[:3]:
        assert relative_error(run(model, ids, cache_of(duo, static), calls), wanted) < 1e-5


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "cohere"])
def test_a_context_within_the_window_is_dense(family, static):
    model = small(family)
    ids = token_ids(1, 30)
    with torch.no_grad():
        wanted = model(ids).logits
    duo = duo_of(model, [[0.0] * len(ones(model)[0])] * 2, sink_size=10, recent_size=20)
    for calls in ([30], [11, 1, 1, 17]):
        assert relative_error(run(model, ids, cache_of(duo, static), calls), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "llama_mha"])
@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"kv_bits": 4}, {"prefill": "streaming"},
                                     {"decode_window": "mask"}], ids=str)  # fmt: skip
def test_the_static_cache_equals_the_dynamic_one(family, options):
    model = small(family)
    heads = len(ones(model)[0])
    duo = duo_of(model, [[float(head % 2 == layer) for head in range(heads)] for layer in range(2)], **options)
    ids = token_ids(2, 40)
    for calls in CALLS:
        found, wanted = (run(model, ids, cache_of(duo, static), calls) for static in (True, False))
        assert (found - wanted).abs().max() < 2e-5 * max(1, wanted.abs().max())


def test_patterns_matter(llama):
    duo, ids = duo_of(llama), token_ids(1, 40)
    dense = run(llama, ids, DynamicCache(), [40])
    assert relative_error(run(llama, ids, duo.make_cache(), [17, 23]), dense) > 1e-3


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_streaming_with_the_mask_does_not_depend_on_chunks(llama, static):
    duo = duo_of(llama, prefill="streaming", decode_window="mask")
    ids = token_ids(2, 40)
    wanted = run(llama, ids, cache_of(duo, static), [40])
    for calls in ([1] * 40, *CALLS[1:]):
        assert relative_error(run(llama, ids, cache_of(duo, static), calls), wanted) < 1e-5


@pytest.mark.parametrize("options", [{}, {"prefill": "streaming"}, {"decode_window": "mask"}, {"kv_bits": 8}], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("calls", [[40], [17, 20, 1, 1, 1], [8, 8, 8, 16]], ids=str)
def test_rows_of_a_padded_batch_are_what_they_are_alone(llama, static, options, calls):
    duo = duo_of(llama, **options)
    padding = [0, 5, 12]
    ids, mask = token_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    calls = [*calls, 1, 1, 1]
    ids, mask = torch.cat([ids, token_ids(3, 3)], dim=1), torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
    found = run(llama, ids, cache_of(duo, static, 43), calls, mask)
    for row, count in enumerate(padding):
        own, skipped = [], count
        for tokens in calls:
            own.append(max(0, tokens - skipped))
            skipped = max(0, skipped - tokens)
        alone = run(llama, ids[row : row + 1, count:], cache_of(duo, static, 43), [n for n in own if n])
        # Codes of 8 bits: a first call sees its own tokens unrounded, and which call is a row's first differs here.
        assert relative_error(found[row, count:], alone[0]) < (1e-5 if duo.config.kv_bits == 16 else 5e-3), row


def test_padding_elsewhere_is_refused(llama):
    duo, ids = duo_of(llama), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        llama(ids, attention_mask=mask, past_key_values=duo.make_cache())


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_bytes_are_the_plan_s(llama, static, bits):
    duo = duo_of(llama, kv_bits=bits)
    for tokens in (7, 11, 40):
        cache = cache_of(duo, static, tokens)
        run(llama, token_ids(2, tokens), cache, [tokens])
        size = 16 * 4 if bits == 16 else 16 * bits // 8 + 4
        of_heads = [sum(row) * tokens + (2 - sum(row)) * min(tokens, SINK + RECENT) for row in MIXED]
        assert cache_bytes(cache) == sum(2 * 2 * size * int(slots) for slots in of_heads)
        planned = plan(llama.config, duo.config, context=tokens, batch_size=2, element_bytes=4)
        assert planned.cache_bytes == cache_bytes(cache)


def test_streaming_heads_forget(llama):
    """O10: with streaming heads only, a changed token outside of sink and window changes nothing in the first layer."""
    duo = duo_of(llama, [[0.0, 0.0]] * 2)
    ids = token_ids(1, 41)
    other = ids.clone()
    other[0, 20] = (ids[0, 20] + 1) % 128
    outputs = []
    hook = llama.model.layers[0].self_attn.register_forward_hook(
        lambda module, given, output: outputs.append(output[0])
    )
    for tokens in (ids, other):
        run(llama, tokens, duo.make_cache(), [40, 1])
    hook.remove()
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("reorder", [False, True])
def test_reordering_leaves_the_function(reorder):
    model = small("qwen2", attention_bias=True)
    with torch.no_grad():
        for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            linear.bias.normal_()
    duo = duo_of(model, [[0.0, 1.0], [1.0, 0.0]])
    ids = token_ids(2, 40)
    wanted = run(model, ids, duo.make_cache(), [30, 8, 1, 1])
    if reorder:
        stock = run(model, ids, DynamicCache(), [40])
        duo = duo_of(model, [[0.0, 1.0], [1.0, 0.0]], reorder=True)
        assert duo.full_heads == [[True, False]] * 2
        assert relative_error(run(model, ids, DynamicCache(), [40]), stock) < 1e-6
    assert relative_error(run(model, ids, duo.make_cache(), [30, 8, 1, 1]), wanted) < 1e-6


def test_an_output_bias_stays_when_heads_are_reordered():
    model = small("llama", attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    ids = token_ids(1, 20)
    wanted = run(model, ids, DynamicCache(), [20])
    bias = model.model.layers[0].self_attn.o_proj.bias.clone()
    duo_of(model, [[0.0, 1.0], [0.0, 1.0]], reorder=True)
    assert torch.equal(model.model.layers[0].self_attn.o_proj.bias, bias)
    assert relative_error(run(model, ids, DynamicCache(), [20]), wanted) < 1e-6


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_sequences_of_a_batch_can_be_exchanged_and_repeated(llama, static):
    duo = duo_of(llama)
    ids, order = token_ids(3, 30), torch.tensor([2, 0, 2])
    cache = cache_of(duo, static)
    run(llama, ids[:, :25], cache, [25])
    cache.reorder_cache(order)
    found = run(llama, ids[order][:, 25:], cache, [1] * 5)
    wanted = run(llama, ids[order], cache_of(duo, static), [25, 1, 1, 1, 1, 1])[:, 25:]
    assert relative_error(found, wanted) < 1e-6
    cache = cache_of(duo, static)
    run(llama, ids[:1, :25], cache, [25])
    cache.batch_repeat_interleave(2)
    found = run(llama, ids[:1, 25:].repeat(2, 1), cache, [5])
    wanted = run(llama, ids[:1], cache_of(duo, static), [25, 5])[:, 25:]
    assert relative_error(found[1:], wanted) < 1e-6


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_crop_takes_tokens_back(llama, static, options):
    duo = duo_of(llama, **options)
    ids = token_ids(2, 40)
    cache = cache_of(duo, static)
    run(llama, ids[:, :30], cache, [30])
    cache.crop(-4)
    assert int(cache.get_seq_length()) == 26
    layer = cache.layers[0]
    assert layer.window()[0][0].shape[2] == SINK + RECENT - 4
    # Full heads see all that is left; streaming heads the sink and the last that are left.
    again = cache_of(duo, static)
    run(llama, ids[:, :26], again, [26])
    for ours, theirs in zip(layer.full, again.layers[0].full, strict=True):
        assert torch.equal(ours[:, :, :26], theirs[:, :, :26])
    kept, wanted = layer.window()[0], again.layers[0].window()[0]
    for ours, theirs in zip(kept, wanted, strict=True):
        assert torch.allclose(ours, torch.cat([theirs[:, :, :SINK], theirs[:, :, SINK + 4 :]], dim=2))
    run(llama, ids[:, 26:31], cache, [1] * 5)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-RECENT - 1)


def test_within_the_window_crop_is_exact(llama):
    duo, ids = duo_of(llama), token_ids(1, 10)
    for static in (False, True):
        cache = cache_of(duo, static)
        run(llama, ids, cache, [10])
        cache.crop(-6)
        found = run(llama, ids[:, 4:], cache, [6])
        assert relative_error(found, run(llama, ids, duo.make_cache(), [10])[:, 4:]) < 1e-5


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_reset_cache_is_as_new(llama, static):
    duo, ids = duo_of(llama), token_ids(1, 30)
    cache = cache_of(duo, static)
    wanted = run(llama, ids, cache, [20, 10])
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(run(llama, ids, cache, [20, 10]), wanted)


def test_generate(llama):
    duo, ids = duo_of(llama), token_ids(2, 30)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = llama.generate(ids, past_key_values=duo.make_cache(), **options)
    chunked = llama.generate(ids, past_key_values=duo.make_cache(), prefill_chunk_size=16, **options)
    static = llama.generate(ids, past_key_values=cache_of(duo, True, 36), **options)
    assert torch.equal(tokens, static)
    cache = duo.make_cache()
    logits = run(llama, ids, cache, [16, 14])[:, -1:]
    for step in range(6):
        assert torch.equal(chunked[:, 30 + step], logits[:, -1].argmax(-1))
        logits = run(llama, chunked[:, 30 + step : 31 + step], cache, [1])


def test_beam_search(llama):
    ids = token_ids(1, 20)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3, "do_sample": False}
    llama.set_attn_implementation("sdpa")
    wanted = llama.generate(ids, **options)
    full = duo_of(llama, ones(llama))
    assert torch.equal(llama.generate(ids, past_key_values=full.make_cache(), **options), wanted)
    mixed = duo_of(llama)
    dynamic = llama.generate(ids, past_key_values=mixed.make_cache(), **options)
    assert torch.equal(llama.generate(ids, past_key_values=cache_of(mixed, True), **options), dynamic)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_heads_unpacked_one_by_one_are_what_they_are_together(llama, monkeypatch, static):
    duo, ids = duo_of(llama, [[1.0, 1.0], [1.0, 0.0]], kv_bits=4), token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    wanted = run(llama, ids, cache_of(duo, static), [20, 20], mask)
    unpacked, original = [], DuoLayer.decoded

    def noted(layer, tensors):
        unpacked.append(tensors[0].shape[1])
        return original(layer, tensors)

    monkeypatch.setattr(DuoLayer, "decoded", noted)
    monkeypatch.setattr(cache_module, "UNPACKED_BYTES", 1)
    assert relative_error(run(llama, ids, cache_of(duo, static), [20, 20], mask), wanted) < 1e-6
    assert unpacked == [1, 1, 1, 1]  # two full heads, one, and the streaming one


@pytest.mark.parametrize("bits", [16, 4])
def test_a_decoding_step_compiles_as_one_graph(llama, bits):
    duo, ids = duo_of(llama, kv_bits=bits), token_ids(2, 40)
    cache, eager = cache_of(duo, True), cache_of(duo, True)
    run(llama, ids[:, :30], cache, [30])
    run(llama, ids[:, :30], eager, [30])
    torch._dynamo.reset()
    step = torch.compile(llama.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for position in range(30, 36):
            tokens, at = ids[:, position : position + 1], torch.full((2, 1), position)
            found = step(tokens, position_ids=at, past_key_values=cache).logits
            wanted = llama(tokens, position_ids=at, past_key_values=eager).logits
            assert relative_error(found, wanted) < 1e-6


def test_without_a_duo_cache_the_model_is_as_it_is(llama):
    ids = token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        wanted = llama(ids, attention_mask=mask).logits
        duo_of(llama)
        assert torch.equal(llama(ids, attention_mask=mask, past_key_values=DynamicCache()).logits, wanted)


def test_a_layer_with_a_sliding_window_keeps_it():
    model = small("gemma3", sliding_window=8)
    duo, ids = duo_of(model, [[1.0, 1.0], [1.0, 0.0]]), token_ids(1, 40)
    wanted = run(model, ids, DynamicCache(config=model.config), [40])
    found = run(model, ids, duo.make_cache(), [40])
    assert relative_error(found, wanted) < 1e-5  # the first chunk is dense
    static, dynamic = (run(model, ids, cache_of(duo, static), [30, 1, 9]) for static in (True, False))
    assert relative_error(static, dynamic) < 1e-5
    with pytest.raises(ValueError, match="layer 0"):
        duo_of(model, [[1.0, 0.0], [1.0, 0.0]])


def test_copies_are_independent(llama):
    duo, ids = duo_of(llama), token_ids(1, 30)
    cache = duo.make_cache()
    run(llama, ids[:, :20], cache, [20])
    other = copy.deepcopy(cache)
    wanted = run(llama, ids[:, 20:], cache, [10])
    assert torch.equal(run(llama, ids[:, 20:], other, [10]), wanted)


@pytest.mark.parametrize(("change", "message"), [
    (lambda model, duo, cache: duo_of(model, [[1.0, 0.0, 1.0]] * 2), "gates"),
    (lambda model, duo, cache: duo_of(small("deepseek_v3")), "latent"),
    (lambda model, duo, cache: duo_of(small("mistral", sliding_window=16)), "sliding"),
    (lambda model, duo, cache: run(model, token_ids(1, 41), cache_of(duo, True), [41]), "max_len"),
    (lambda model, duo, cache: run(small(seed=1), token_ids(1, 4), cache, [4]), "duo"),
    (lambda model, duo, cache: run(duo_of(small("llama_mha"), None).model, token_ids(1, 4), cache, [4]), "heads"),
    (lambda model, duo, cache: run(duo_of(small(seed=1)).model, token_ids(1, 4), cache, [4]), "another model"),
    (lambda model, duo, cache: duo.make_cache(static=True), "max_len"),
    (lambda model, duo, cache: duo.make_cache(max_len=10), "max_len"),
    (lambda model, duo, cache: duo.make_cache(static=True, max_len=0), "max_len"),
    (lambda model, duo, cache: duo_of(small("bloom")), "interface"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_be_is_refused(llama, change, message):
    duo = duo_of(llama)
    with pytest.raises((ValueError, TypeError), match=message):
        change(llama, duo, duo.make_cache())


def test_a_full_static_cache_refuses_another_token(llama):
    duo, ids = duo_of(llama), token_ids(1, 12)
    cache = cache_of(duo, True, 11)
    run(llama, ids[:, :11], cache, [9, 1, 1])
    before = [tensor.clone() for tensor in cache.layers[0].full]
    with pytest.raises(ValueError, match="max_len"):
        run(llama, ids[:, 11:], cache, [1])
    assert all(torch.equal(*pair) for pair in zip(before, cache.layers[0].full, strict=True))


def test_a_first_call_of_one_token(llama):
    duo, ids = duo_of(llama), token_ids(2, 12)
    wanted = run(llama, ids, DynamicCache(), [12])[:, :8]
    for static in (False, True):
        assert relative_error(run(llama, ids[:, :8], cache_of(duo, static), [1] * 8), wanted) < 1e-5


def test_the_default_keeps_every_head(llama):
    duo = apply_duo(llama, DuoAttentionConfig())
    assert duo.full_heads == [[True, True]] * 2
