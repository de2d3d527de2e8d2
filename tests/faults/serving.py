"""Serving with vLLM under load: the methods that serve, and crowds of requests whose answers are known beforehand.

A new method is one entry of METHODS. Models are random, so every token depends on all that a request has in its cache;
a prompt counts only if its answer is decided: no logit comes within MARGIN of the largest one. Then rounding, which
batching changes, cannot change a token, and a wrong token is a wrong computation.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 512}
LENGTH, BLOCK = 256, 32  # tokens; vLLM's attention on a CPU takes no shorter blocks
ON_GPU = torch.cuda.is_available()
# vLLM's attention on a GPU takes no float32. Fewer answers are decided in 16 bits, and fewer still long ones.
DTYPE, MARGIN, TRIED = ("float16", 1e-2, 4) if ON_GPU else ("float32", 1e-3, 1)
ENGINE = {
    "dtype": DTYPE, "skip_tokenizer_init": True, "enforce_eager": True, "disable_log_stats": False,
    "max_model_len": LENGTH, "max_num_batched_tokens": LENGTH, "max_num_seqs": 64, "block_size": BLOCK,
    "enable_prefix_caching": False, "num_gpu_blocks_override": 640,
}  # fmt: skip
if ON_GPU:  # engines of several tests stand beside each other
    ENGINE |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**30}


@dataclass(frozen=True)
class Served:
    """A method that serves.

    Attributes:
        options: the engine's, by which a user asks for the method.
        packed: whether its checkpoint has packed weights.
        forward: a function of the method that every step calls, as "module:class.function".
    """

    options: dict[str, Any]
    packed: bool
    forward: str


AWQ = {"quantization": "pronghorn_awq"}
DUO = {
    "hf_overrides": {"architectures": ["DuoAttentionLlamaForCausalLM"]},
    "additional_config": {
        "duoattention": {"gates": [[1.0, 0.0], [0.0, 1.0]], "threshold": 0.5, "sink_size": 16, "recent_size": 32}
    },
}
AWQ_FORWARD = "pronghorn.awq.vllm:AwqLinearMethod.apply"
DUO_FORWARD = "pronghorn.duoattention.vllm.backend:SinkWindowImpl.forward"
METHODS = {
    "awq": Served(AWQ, True, AWQ_FORWARD),
    "duoattention": Served(DUO, False, DUO_FORWARD),
    "awq and duoattention": Served({**AWQ, **DUO}, True, DUO_FORWARD),
}
ALONE = [name for name in METHODS if " " not in name]
ANSWER = 32  # tokens, of those that are known
FEW = 48  # blocks, of which requests need up to 8
FEATURES = ("prefix cache", "chunked prefill", "compiled", "async scheduling", "speculation")
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def save_models(model: Any, folder: Path, group_size: int) -> None:
    """A model and its packed form, in `folder/whole` and `folder/packed`."""
    from transformers import AutoModelForCausalLM

    import pronghorn.transformers  # noqa: F401 - registers
    from pronghorn.awq import AwqConfig

    model.save_pretrained(folder / "whole")
    how = {"dtype": model.dtype, "quantization_config": AwqConfig(group_size=group_size, method="rtn")}
    packed = AutoModelForCausalLM.from_pretrained(folder / "whole", device_map=str(model.device), **how)
    packed.save_pretrained(folder / "packed")


def engine_options(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What an engine is made with: of `vllm.LLM` or `AsyncEngineArgs`."""
    method = METHODS[name]
    model = str(folder / ("packed" if method.packed else "whole"))
    return {"model": model, **ENGINE, **method.options, **changes}


@contextmanager
def in_process(folder: Path, name: str, **changes: Any) -> Iterator[Any]:
    """An engine in this process, and the only one: when vLLM ends one, it ends what all of them share."""
    from vllm import LLM

    gc.collect()
    llm = LLM(**engine_options(folder, name, **changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@asynccontextmanager
async def serving(folder: Path, name: str, **changes: Any) -> AsyncIterator[Any]:
    """An engine in a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_options(folder, name, **changes)))
    try:
        yield engine
    finally:
        engine.shutdown()


def flags(options: dict[str, Any]) -> list[str]:
    """Options of an engine as those of `vllm serve`, but for the model, and what is off."""
    written = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            written += [f"--{flag}"] * value
        elif name != "model":
            written += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return written


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        prompt: token ids.
        tokens: of the answer.
        copies: answers to the same prompt; several are sampled, which vLLM wants, from the best token alone.
        leaves_after: tokens after which the client goes away; 0 while it waits for the first one. None: it stays.
    """

    prompt: list[int]
    tokens: int
    copies: int = 1
    leaves_after: int | None = None

    def sampling(self, **changes: Any) -> Any:
        """vLLM's parameters."""
        from vllm import SamplingParams

        how = {"temperature": 0.0} if self.copies == 1 else {"temperature": 1.0, "top_k": 1}
        return SamplingParams(
            n=self.copies, max_tokens=self.tokens, ignore_eos=True, detokenize=False, **{**how, **changes}
        )


@dataclass
class Outcome:
    """What a client got: each copy's tokens, by its number, as far as it stayed; or an error; and after how long."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    error: Exception | None = None
    seconds: float = 0.0

    def take(self, answer: Any) -> None:
        """What there is now of some copies."""
        self.tokens |= {one.index: list(one.token_ids) for one in answer.outputs}

    def left(self, request: Request) -> bool:
        """Whether the client has seen enough."""
        seen = max(map(len, self.tokens.values()), default=0)
        return request.leaves_after is not None and seen >= request.leaves_after


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts of 20 to 99 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 100, (count,), generator=draw).tolist()
    return [torch.randint(3, 128, (length,), generator=draw).tolist() for length in lengths]


def decided(
    llm: Any, candidates: Sequence[list[int]], tokens: int, *, together: bool = False, adapter: Any = None
) -> list[tuple]:
    """Prompts with decided answers, and those: (prompt, answer); asked one after the other unless `together`."""
    how = Request([], tokens).sampling(logprobs=2)
    asked = [{"prompt_token_ids": prompt} for prompt in candidates]
    groups = [asked] if together else [[one] for one in asked]
    given = [llm.generate(group, how, lora_request=adapter, use_tqdm=False) for group in groups]
    answers = [answer.outputs[0] for group in given for answer in group]
    margins = [min(_margin(place) for place in answer.logprobs) for answer in answers]
    kept = zip(candidates, answers, margins, strict=True)
    return [(prompt, list(answer.token_ids)) for prompt, answer, margin in kept if margin > MARGIN]


def _margin(place: dict[int, Any]) -> float:
    best, second, *_ = sorted((token.logprob for token in place.values()), reverse=True)
    return best - second


def worst_gap(llm: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> float:
    """By how much, in nats, the best token is at most ahead of an answer's, given all before it; each asked alone."""
    how, worst = Request([], 1).sampling(prompt_logprobs=1), 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        (found,) = llm.generate([{"prompt_token_ids": prompt + answer}], how, use_tqdm=False)
        places = found.prompt_logprobs[len(prompt) :]
        gaps = [
            max(one.logprob for one in place.values()) - place[token].logprob
            for place, token in zip(places, answer, strict=True)
        ]
        worst = max(worst, *gaps)
    return worst


def crowd(known: Sequence[tuple], count: int, tokens: Sequence[int]) -> list[Request]:
    """Requests for prompts of `known`; three in ten go away, a third of those before they have a token."""
    requests = []
    for index in range(count):
        prompt, _ = known[index % len(known)]
        leaves_after = {1: 0, 4: 3, 7: 7}.get(index % 10)
        wanted = tokens[index // 2 % len(tokens)]
        if leaves_after is not None:
            wanted = max(wanted, leaves_after + 1)
        requests.append(Request(prompt, wanted, 3 if index % 25 == 12 else 1, leaves_after))
    return requests


def wrong(requests: Sequence[Request], outcomes: Sequence[Outcome], known: Sequence[tuple]) -> list[int]:
    """Which of some requests got anything but what they get alone."""
    answers = {tuple(prompt): answer for prompt, answer in known}
    found = []
    for index, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
        whole = answers[tuple(request.prompt)][: request.tokens]
        if request.leaves_after is None:
            right = outcome.tokens == dict.fromkeys(range(request.copies), whole)
        else:  # it has seen the beginning, at least as much as it waited for
            right = all(one == whole[: len(one)] for one in outcome.tokens.values()) and outcome.left(request)
        if outcome.error is not None or not right:
            found.append(index)
    return found


def ask_in_process(llm: Any, requests: Sequence[Request], each_step: Any = None) -> list[Outcome]:
    """All at once, of an engine in this process; clients leave between steps. `each_step` is called after every one."""
    engine = llm.llm_engine
    outcomes = [Outcome() for _ in requests]
    for index, request in enumerate(requests):
        engine.add_request(str(index), {"prompt_token_ids": request.prompt}, request.sampling())
    gone = {index for index, request in enumerate(requests) if outcomes[index].left(request)}
    engine.abort_request([str(index) for index in gone])
    while engine.has_unfinished_requests():
        for answer in engine.step():
            index = int(answer.request_id)
            outcomes[index].take(answer)
            if not answer.finished and index not in gone and outcomes[index].left(requests[index]):
                gone.add(index)
                engine.abort_request([answer.request_id])
        if each_step:
            each_step()
    return outcomes


def ask_with_features(folder: Path, name: str, requests: Sequence[Request], on: Sequence[int]) -> tuple[list, tuple]:
    """The first half of some requests at once, and then the other; and for each of FEATURES what was seen of it."""
    from vllm.platforms import current_platform

    cached, chunked, compiled, ahead, speculates = map(bool, on)
    platform = type(current_platform)
    whole = platform.check_and_update_config.__func__

    def check(platform: Any, config: Any) -> None:
        whole(platform, config)
        config.scheduler_config.async_scheduling = ahead  # it is off on CPUs, where it saves nothing

    how = {"enable_prefix_caching": cached, "enable_chunked_prefill": chunked, "enforce_eager": not compiled}
    how |= {"async_scheduling": ahead, "speculative_config": SPECULATION if speculates else None}
    half, cut = len(requests) // 2, []
    with patch.object(platform, "check_and_update_config", classmethod(check)), in_process(folder, name, **how) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler

        def look() -> None:
            cut.extend(one for one in scheduler.running if 0 < one.num_computed_tokens < one.num_prompt_tokens)

        outcomes = [
            outcome for part in (requests[:half], requests[half:]) for outcome in ask_in_process(llm, part, look)
        ]
        compilation = int(llm.llm_engine.vllm_config.compilation_config.mode)
        ran_ahead = type(scheduler).__name__ == "AsyncScheduler"
    seen = metric("prefix_cache_hits"), len(cut), compilation, ran_ahead, metric("spec_decode_num_accepted_tokens")
    return outcomes, seen


async def ask(engine: Any, requests: Sequence[Request], name: str = "") -> list[Outcome]:
    """All at once, of an `AsyncLLM`; a client leaves as HTTP's do, by cancelling or by closing the stream."""
    outcomes = [Outcome() for _ in requests]
    started = asyncio.Event()

    async def client(index: int) -> None:
        request, outcome, asked = requests[index], outcomes[index], time.monotonic()
        stream = engine.generate({"prompt_token_ids": request.prompt}, request.sampling(), f"{name}{index}")
        try:
            async for answer in stream:
                started.set()
                outcome.take(answer)
                if outcome.left(request):
                    await stream.aclose()
                    return
        except Exception as error:  # noqa: BLE001 - it is what the client got
            outcome.error = error
        finally:
            outcome.seconds = time.monotonic() - asked
            started.set()

    tasks = [asyncio.create_task(client(index)) for index in range(len(requests))]
    await started.wait()
    for request, task in zip(requests, tasks, strict=True):
        if request.leaves_after == 0:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


def give_back_freed_memory() -> None:
    """To the system; what an allocator keeps for later is noise in what a process holds."""
    ctypes.CDLL(None).malloc_trim(0)


class Tidy:
    """For `worker_extension_cls`."""

    def tidy(self) -> None:
        """Give back freed memory."""
        give_back_freed_memory()


def gpu_memory() -> int:
    """Bytes of the GPU that anyone has taken."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def free_blocks(llm: Any) -> int:
    """Blocks that no request holds, in an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def metric(name: str) -> float:
    """A counter or gauge of the engine that was made last."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(one.value for one in get_metrics_snapshot() if one.name == f"vllm:{name}")
