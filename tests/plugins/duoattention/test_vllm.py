"""DuoAttention in vLLM: transformers' tokens, whatever else runs, and blocks that are given back."""

import os

import pytest
import torch
from tests.models import tiny_model
from tests.vllm_ranks import tokens_of_ranks

from pronghorn.duoattention import DuoAttentionConfig, apply_duo

vllm = pytest.importorskip("vllm", reason="the vllm extra is not installed")
pytestmark = pytest.mark.xdist_group("vllm")

SINK, RECENT, BLOCK = 40, 30, 32
EVEN = [[1.0, 0.0], [0.0, 1.0]]
PATTERNS = {
    "even": EVEN,
    "uneven": [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]],
    "a layer that streams": [[0.0, 0.0], [1.0, 0.0]],
    "a layer that is full": [[1.0, 1.0], [0.0, 1.0]],
    "all stream": [[0.0, 0.0], [0.0, 0.0]],
}


def prompts(*lengths):
    return [[3 + (7 * i + 11 * j + j * j) % 120 for j in range(length)] for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved tiny models, by family and number of key/value heads."""
    made = {}

    def model(family="llama", heads=2):
        if (family, heads) not in made:
            folder = tmp_path_factory.mktemp(family)
            sizes = {"num_key_value_heads": heads, "num_attention_heads": 4, "max_position_embeddings": 512}
            if family == "mistral":
                sizes["sliding_window"] = None  # as the published models have it
            tiny_model(family, hidden_size=128, head_dim=32, **sizes).save_pretrained(folder)
            made[family, heads] = folder
        return made[family, heads]

    return model


def settings(gates, **options):
    return {"gates": gates, "threshold": 0.5, "sink_size": SINK, "recent_size": RECENT, **options}


def engine(folder, duo, architecture="LlamaForCausalLM", **options):
    how = {"max_num_batched_tokens": 48, "max_num_seqs": 4, "max_model_len": 512, "block_size": BLOCK,
           "enable_prefix_caching": False, **options}  # fmt: skip
    return vllm.LLM(
        str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        hf_overrides={"architectures": [f"DuoAttention{architecture}"]}, additional_config={"duoattention": duo}, **how,
    )  # fmt: skip


def generate(llm, ids, tokens=12):
    sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in found]


def wanted_tokens(folder, duo, ids, tokens=12, step=None):
    """Transformers', one prompt after the other; `step` tokens of it at once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cached = apply_duo(model, DuoAttentionConfig(**{"prefill": "streaming", **duo}))
    found = []
    for prompt in ids:
        cache, new = cached.make_cache(), []
        with torch.no_grad():
            for part in torch.tensor([prompt]).split(step or len(prompt), dim=1):
                logits = model(part, past_key_values=cache).logits
            while len(new) < tokens:
                new.append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([new[-1:]]), past_key_values=cache).logits
        found.append(new)
    return found


def managers(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers


def blocks_held(llm):
    """Most blocks that a sequence has in each group, by the kind of its manager, over all steps until it is done."""
    held = {}
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        for index, manager in enumerate(managers(llm)):
            for blocks in manager.req_to_blocks.values():
                alive = sum(not block.is_null for block in blocks)
                key = type(manager).__name__, index
                held.setdefault(key, []).append((alive, len(blocks)))
    return held


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_equal_transformers(models, pattern):
    gates = PATTERNS[pattern]
    folder = models(heads=len(gates[0]))
    duo, ids = settings(gates, decode_window="mask"), prompts(200, 3, 75, 130, 51, 1)
    assert generate(engine(folder, duo), ids) == wanted_tokens(folder, duo, ids)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_models(models, family):
    architecture = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"
    folder, duo, ids = models(family), settings(EVEN, decode_window="mask"), prompts(150, 60)
    assert generate(engine(folder, duo, architecture), ids) == wanted_tokens(folder, duo, ids)


def test_the_authors_window_is_that_of_single_tokens(models):
    folder, ids = models(), prompts(120, 64)
    duo = settings(EVEN)
    one_by_one = wanted_tokens(folder, {**duo, "prefill": "dense_first"}, ids, step=1)
    assert generate(engine(folder, duo), ids) == one_by_one


@pytest.mark.fault(14)
def test_blocks_between_sink_and_window_are_given_back(models):
    llm = engine(models(), settings(EVEN))
    free = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    sampling = vllm.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("0", {"prompt_token_ids": prompts(400)[0]}, sampling)
    held = blocks_held(llm)
    kinds = {kind for kind, _ in held}
    assert kinds == {"FullAttentionManager", "SinkWindowManager"}
    for (kind, _), counts in held.items():
        alive, length = counts[-1]
        assert length == 14  # for 429 tokens
        # Two blocks of the sink; 31 tokens, the new one among them, lie in at most two.
        assert alive == 14 if kind == "FullAttentionManager" else alive <= 4
        if kind == "SinkWindowManager":
            assert max(count for count, _ in counts) <= 2 + -(-(RECENT + 48) // BLOCK) + 1
    assert free() == before
    llm.llm_engine.add_request("1", {"prompt_token_ids": prompts(400)[0]}, sampling)
    for _ in range(12):
        llm.llm_engine.step()
    assert free() < before
    (request,) = managers(llm)[0].req_to_blocks
    llm.llm_engine.abort_request([request], internal=True)
    llm.llm_engine.step()
    assert free() == before


def test_what_a_sequence_is_admitted_with_covers_the_sink():
    from pronghorn.duoattention.vllm.kv_cache import SinkWindowSpec

    spec = SinkWindowSpec(
        block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32, sliding_window=31, sink_size=20
    )
    plain = -(-(30 + 48) // 16) + 1
    assert spec.max_admission_blocks_per_request(48, 512) == plain + 2


@pytest.mark.fault(13)
def test_a_cached_prefix_changes_nothing(models):
    folder, duo = models(), settings(EVEN)
    shared = prompts(180)[0]
    ids = [shared, shared[:120] + prompts(40)[0], shared + prompts(30)[0], shared[:33], shared]
    wanted = generate(engine(folder, duo), ids)
    llm = engine(folder, duo, enable_prefix_caching=True)
    found, cached = [], []
    for prompt in ids:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        found.append(list(answer.outputs[0].token_ids))
        cached.append(answer.num_cached_tokens)
    assert found == wanted
    assert cached[0] == 0
    assert cached[4] >= 128  # the first prompt again


@pytest.mark.fault(13)
def test_a_prefix_without_its_sink_is_not_taken_over(models):
    """Blocks of the sink are the first to be reused by others: then the window alone must not count."""
    folder, duo = models(), settings(EVEN)
    first, others = prompts(200)[0], [[(5 * i + j) % 90 + 3 for j in range(150)] for i in range(12)]
    wanted = generate(engine(folder, duo), [first])
    llm = engine(folder, duo, enable_prefix_caching=True, num_gpu_blocks_override=64)
    assert generate(llm, [first]) == wanted
    generate(llm, others)
    assert generate(llm, [first]) == wanted
    assert generate(llm, [first]) == wanted


@pytest.mark.fault(12)
def test_preempted_requests_give_the_same_tokens(models):
    folder, duo, ids = models(), settings(EVEN), prompts(*range(60, 156, 12))
    wanted = [generate(engine(folder, duo), [prompt], 40)[0] for prompt in ids[:1]]
    roomy = generate(engine(folder, duo), ids, 40)
    assert roomy[:1] == wanted
    llm = engine(folder, duo, num_gpu_blocks_override=48, max_num_seqs=8, max_model_len=256, disable_log_stats=False)
    assert generate(llm, ids, 40) == roomy
    counters = {metric.name: metric for metric in llm.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0


@pytest.mark.parametrize(
    ("duo", "message"),
    [
        (None, "wanted DuoAttention's settings as in"),
        ({"pattern": "Llama-9"}, "no full_attention_heads.tsv"),
        ({"pattern": "Llama-3-8B-Instruct-Gradient-1048k", "sparsity": 0.5}, "32 layers of 8 key/value heads"),
        ({}, "pattern: got None"),
        ({"gates": EVEN, "sinks": 4}, "got sinks, accepted are"),
        ({"gates": EVEN, "kv_bits": 4}, "kv_bits: got 4"),
        ({"gates": EVEN, "prefill": "dense_first"}, "prefill: got 'dense_first'"),
        ({"gates": EVEN, "prefill": "streaming", "block_size": 128, "decode_window": "reference"}, "block_size"),
        ({"gates": EVEN, "sink_size": 0}, "sink_size: got 0"),
        ({"gates": EVEN, "recent_size": -3}, "recent_size: got -3"),
        ({"gates": [[float("nan"), 1.0]] * 2}, "got nan for head 0 of layer 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(models, duo, message):
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from pronghorn.duoattention.vllm.models import duo_config, heads_of_rank

    given = {} if duo is None else {"duoattention": duo}
    config: VllmConfig = EngineArgs(str(models()), skip_tokenizer_init=True).create_engine_config()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        heads_of_rank(duo_config(given), config)


@pytest.mark.fault(21)
def test_batch_invariance_is_refused(monkeypatch):
    from vllm import envs

    from pronghorn.duoattention.vllm.models import duo_config, heads_of_rank

    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: is set, and how DuoAttention rounds"):
        heads_of_rank(duo_config({"duoattention": {"gates": EVEN}}), None)


def test_layers_whose_heads_cannot_be_split_are_refused(models, tmp_path):
    tiny_model("gemma2", hidden_size=128, head_dim=32, max_position_embeddings=512).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be split into full and streaming heads: it has a sliding window"):
        engine(tmp_path, settings([[0.0, 1.0], [1.0, 1.0]]), "Gemma2ForCausalLM")


def test_ranks_must_have_as_many_full_heads():
    from pronghorn.duoattention.vllm.models import _share

    row = [True, False, False, True]
    assert _share(row, 0, 2, 1) == [False, True]
    with pytest.raises(ValueError, match=r"2 ranks would have \[2, 0\] full heads of layer 3"):
        _share([True, True, False, False], 3, 2, 0)
    with pytest.raises(ValueError, match="3 ranks cannot share 4"):
        _share(row, 0, 3, 0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each rank is needed")
def test_two_ranks_give_the_tokens_of_transformers(models):
    gates = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]  # a full head for each, the first one's first and last
    folder, duo, ids = models(heads=4), settings(gates, decode_window="mask"), prompts(200, 3, 75)
    found = tokens_of_ranks(
        folder, ids, 12, 2, hf_overrides={"architectures": ["DuoAttentionLlamaForCausalLM"]},
        additional_config={"duoattention": duo}, max_num_batched_tokens=48, max_model_len=512, block_size=BLOCK,
        enable_prefix_caching=False,
    )  # fmt: skip
    assert found == wanted_tokens(folder, duo, ids)
