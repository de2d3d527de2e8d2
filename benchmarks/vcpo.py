"""A step of GRPO and of VCPO on an H100: time and memory, with a model as large as Qwen2-1.5B and random weights.

64 answers of 512 tokens to prompts of 512, in bf16 with AdamW. All share one function for log-probabilities, without
activation checkpointing. GRPO is the same policy gradient with given advantages, by plain accumulation.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from harness import device, median, row, write
from torch import Tensor, nn

from pronghorn.vcpo import Minibatch, ReferenceESS, VCPOSettings, accumulate, accumulate_batched, vcpo_step

GPU = torch.cuda.is_available()
TRAJECTORIES, GROUP, PROMPT, ANSWER = (64, 8, 512, 512) if GPU else (8, 4, 16, 16)
MICRO_BATCHES = (1, 4, 8, 16) if GPU else (1, 2, 4)
STEPS = 3
SIZES = (
    {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
     "num_key_value_heads": 2, "vocab_size": 151936}
    if GPU
    else {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 512}
)  # fmt: skip
# Of each way and micro-batch: seconds a step, and MiB at the most.
Results = dict[str, dict[int, tuple[dict[str, float], float]]]
REACH = {"exact": 1 / 1.35, "ghost": 1 / 1.25}


@dataclass
class Problem:
    """A policy, its optimizer and a minibatch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ids: Tensor
    minibatch: Minibatch

    @classmethod
    def make(cls) -> Problem:
        """Of random weights and tokens; the sampler's log-probabilities are a little off."""
        torch.manual_seed(0)
        with device():
            config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
            ids = torch.randint(SIZES["vocab_size"], (TRAJECTORIES, PROMPT + ANSWER))
            mask = torch.ones(TRAJECTORIES, ANSWER, dtype=torch.bool)
            rewards, groups = torch.rand(TRAJECTORIES), torch.arange(TRAJECTORIES) // GROUP
            with torch.no_grad():
                learner = torch.cat([_log_probs(model, one) for one in ids.split(1)])
            sampler = learner + 0.01 * torch.randn_like(learner)
        minibatch = Minibatch(sampler, mask, rewards, rewards - rewards.mean(), groups)
        return cls(model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=GPU), ids, minibatch)

    def log_probs(self, rows: range) -> Tensor:
        """Of answers' tokens, [rows, tokens]."""
        return _log_probs(self.model, self.ids[rows.start : rows.stop])

    def micro_batches(self, size: int) -> list[range]:
        """Rows of each forward."""
        return [range(start, start + size) for start in range(0, TRAJECTORIES, size)]


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=ANSWER + 1).logits[:, :-1].float()
    return logits.gather(-1, ids[:, -ANSWER:, None])[..., 0] - logits.logsumexp(-1)


def grpo(problem: Problem, size: int) -> None:
    """A step with given advantages."""
    for rows in problem.micro_batches(size):
        log_probs = problem.log_probs(rows)
        ratios = (log_probs - log_probs.detach()).exp()
        advantages = problem.minibatch.advantages[rows.start : rows.stop, None]
        (-(ratios * advantages).mean(-1).sum() / TRAJECTORIES).backward()
    torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0)
    problem.optimizer.step()


def exact(problem: Problem, size: int) -> None:
    """A step of VCPO with a backward for each trajectory."""
    settings = VCPOSettings()
    found = accumulate(
        lambda place: problem.log_probs(range(place, place + 1))[0], list(problem.model.parameters()),
        problem.minibatch, settings,
    )  # fmt: skip
    vcpo_step(found, problem.optimizer, problem.minibatch, settings, ReferenceESS(settings), staleness=1)


def ghost(problem: Problem, size: int) -> None:
    """A step of VCPO with ghost norms."""
    settings = VCPOSettings(opob_grad_norm="ghost")

    def log_probs_of(rows: range) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(len(rows))[:, None].expand(-1, PROMPT + ANSWER)
        return problem.log_probs(rows), numbers

    found = accumulate_batched(log_probs_of, problem.model, problem.minibatch, settings, problem.micro_batches(size))
    vcpo_step(found, problem.optimizer, problem.minibatch, settings, ReferenceESS(settings), staleness=1)


def measured(
    step: Callable[[Problem, int], None], problem: Problem, size: int
) -> tuple[dict[str, float], float] | None:
    """Seconds a step, and the most memory in MiB; None where it does not fit."""
    times = []
    try:
        for number in range(STEPS):
            problem.optimizer.zero_grad(set_to_none=True)
            if number == 1 and GPU:
                torch.cuda.reset_peak_memory_stats()
            _wait()
            start = time.perf_counter()
            step(problem, size)
            _wait()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None
    finally:
        problem.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    memory = torch.cuda.max_memory_allocated() / 2**20 if GPU else 0.0
    return median(times[1:]), memory


def sampling(problem: Problem) -> dict[str, float]:
    """Seconds of transformers' `generate` for all answers."""
    prompts = problem.ids[:, :PROMPT]
    times = []
    for length in (8, ANSWER):
        _wait()
        start = time.perf_counter()
        problem.model.eval().generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, min_new_tokens=length,
            do_sample=True, pad_token_id=0,
        )  # fmt: skip
        _wait()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def main() -> None:
    """Measure and write the results, after each of them."""
    problem = Problem.make()
    found: Results = {}
    for name, step, sizes in (
        ("GRPO", grpo, MICRO_BATCHES), ("exact", exact, (1,)), ("ghost", ghost, MICRO_BATCHES[1:]),
    ):  # fmt: skip
        for size in sizes:
            result = measured(step, problem, size)
            sys.stdout.write(f"{name}, micro-batch {size}: {result}\n")
            sys.stdout.flush()
            if result is None:
                break
            found.setdefault(name, {})[size] = result
            write("vcpo", _rows(found))
    if GPU:
        best = found["ghost"][_best(found["ghost"])][0]
        shape = f"{TRAJECTORIES} x {ANSWER} tokens"
        generated = row("sampling by transformers", "VCPO's step, ghost norms", shape, sampling(problem), best)
        write("vcpo", [*_rows(found), generated])


def _rows(found: Results) -> list[dict[str, Any]]:
    rows = []
    for name in ("exact", "ghost"):
        for against, peer in (("GRPO, micro-batch 1", 1), ("GRPO at its best", _best(found["GRPO"]))):
            if name not in found:
                continue
            size = _best(found[name])
            (mine, memory), (theirs, other) = found[name][size], found["GRPO"][peer]
            reach = REACH[name] if (name == "exact") == (peer == 1) else None
            what, note = f"VCPO, {name} norms, micro-batch {size}", f"GRPO at micro-batch {peer}"
            shape = f"{TRAJECTORIES} x ({PROMPT} + {ANSWER})"
            rows.append(row(f"step, {what}", against, shape, mine, theirs, reach=reach, note=note))
            if GPU:
                ours, others = dict.fromkeys(mine, memory), dict.fromkeys(mine, other)
                rows.append(row(f"memory, {what}", against, shape, ours, others, unit="MiB", note=note))
    return rows


def _best(results: dict[int, tuple[dict[str, float], float]]) -> int:
    return min(results, key=lambda size: results[size][0]["p50"])


if __name__ == "__main__":
    main()
