"""A rollout worker in the trainer's own process, with a model of its own: for tests and small experiments."""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.trainer.utils import get_callable_name, is_async_callable

from pronghorn.trl.async_rollouts import GROUP_ROWS, VERSION_END, Position

WAIT_SECONDS = 0.2  # between signs of life


class InProcessWorker:
    """Makes groups in a thread, and takes new weights between two tokens: TRL's worker and weight transfer in one.

        worker = InProcessWorker(AutoModelForCausalLM.from_pretrained(path), tokenizer, dataset, reward, ...)
        trainer = ...(path, args=args, rollout_worker=worker, weight_transfer=worker)

    A rollout that weights change under goes on with the keys and values that earlier weights left in its cache. Its
    log-probabilities are those that its tokens were sampled with, whichever weights that was. Prompts are taken in
    order, over and over. Given the versions of the weights that each group saw, what is sampled follows from the seed.

    Args:
        model: its own, not the trainer's; its weights come from the trainer before the first token.
        processing_class: the tokenizer.
        dataset: rows with a `prompt`, text or messages; other columns go to reward functions.
        reward_funcs: as of `GRPOTrainer`; their rewards are added up.
        num_generations: rollouts of a prompt.
        max_completion_length: tokens of a completion.
        temperature: of sampling, and of the log-probabilities.
        seed: of sampling.
        queue_maxsize: rows that wait at most.

    Raises:
        ValueError, TypeError: an argument is none that makes rollouts.
    """

    def __init__(
        self, model: PreTrainedModel, processing_class: Any, dataset: Any,
        reward_funcs: Callable[..., Any] | list[Callable[..., Any]], *, num_generations: int,
        max_completion_length: int, temperature: float = 1.0, seed: int = 0, queue_maxsize: int = 1024,
    ) -> None:  # fmt: skip
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise ValueError(f"dataset: got {type(dataset).__name__} without rows, wanted one with a length")
        for name, value in (("num_generations", num_generations), ("max_completion_length", max_completion_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least 1")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: got {temperature!r}, wanted a positive number")
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue(queue_maxsize)
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self.model_version = 0
        self._model, self._tokenizer, self._dataset = model.eval(), processing_class, dataset
        self._reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._count, self._temperature, self._seed = num_generations, temperature, seed
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self._ends = list(dict.fromkeys([processing_class.eos_token_id, *ends]))
        # Whatever else the model's own configuration holds would change what is sampled.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=max_completion_length, do_sample=False, eos_token_id=self._ends,
            pad_token_id=processing_class.eos_token_id if processing_class.pad_token_id is None
            else processing_class.pad_token_id,
        )  # fmt: skip
        self._position, self._allowed = Position(), math.inf
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._updating = self._busy = False
        self._failure: BaseException | None = None
        self._sign_of_life = 0.0

    # TRL's RolloutWorkerProtocol

    def start(self) -> None:
        """Begin, or begin again after `stop`."""
        if self._thread is not None:
            return
        self._stopping, self._failure, self._sign_of_life = False, None, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="in-process-rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End within a token; what is not whole is given up."""
        if self._thread is None:
            return
        with self._turn:
            self._stopping, self._updating = True, False
            self._turn.notify_all()
        self._thread.join()
        self._thread = None

    def update_model_version(self, model_version: int) -> None:
        """Tokens from now on are of this version; generation, if it paused, goes on."""
        with self._turn:
            self.model_version, self._updating = model_version, False
            self._turn.notify_all()

    def check_health(self, stale_after_s: float) -> None:
        """Raise a RuntimeError if generation failed, is not running, or shows no sign of life."""
        if self._failure is not None:
            raise RuntimeError("generation in this process has failed") from self._failure
        if self._thread is None:
            raise RuntimeError("generation in this process is not running")
        age = time.monotonic() - self._sign_of_life
        if age > stale_after_s:
            raise RuntimeError(f"generation in this process has shown no sign of life for {age:.0f} s")

    # TRL's WeightTransferProtocol

    def init_weight_transfer(self) -> None:
        """Nothing is needed."""

    def pause(self) -> None:
        """Wait for the token that is computed now; the next one waits."""
        with self._turn:
            self._updating = True
            self._turn.wait_for(lambda: not self._busy)

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Take weights by name.

        Raises:
            ValueError: a name or a shape is not one of the model's.
        """
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, weight in iterator:
                if name not in own or own[name].shape != weight.shape:
                    wanted = list(own[name].shape) if name in own else "no such parameter"
                    raise ValueError(f"{name}: got {list(weight.shape)}, the sampler's model has {wanted}")
                own[name].copy_(weight)

    def resume(self) -> None:
        """Generation goes on with `update_model_version`, so that no token is tagged with the version before."""

    def destroy(self) -> None:
        """Nothing was needed."""

    # PacedWorker

    def allow(self, groups: int) -> None:
        """Groups below this number may be started."""
        with self._turn:
            self._allowed = groups
            self._turn.notify_all()

    def go_on(self, position: Position) -> None:
        """Before the start: make the groups that are not done at this position."""
        self._position = Position(position.first, set(position.beyond))

    # the thread

    def _run(self) -> None:
        try:
            for group in itertools.count(self._position.first):
                if group not in self._position.beyond:
                    self._wait_until_allowed(group)
                    self._make(group)
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - check_health tells it
            self._failure = error
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()

    def _make(self, group: int) -> None:
        row = self._dataset[group % len(self._dataset)]
        prompt_ids = self._prompt_ids(row["prompt"])
        started = time.monotonic()
        seed = int(np.random.SeedSequence((self._seed, group)).generate_state(1)[0])
        generator = torch.Generator(self._model.device).manual_seed(seed)
        sampling = _Sampling(self._temperature, generator, self._between_tokens)
        tokens = self._model.generate(
            torch.tensor([prompt_ids] * self._count, device=self._model.device),
            attention_mask=torch.ones(self._count, len(prompt_ids), dtype=torch.long, device=self._model.device),
            logits_processor=LogitsProcessorList([sampling]),
        )[:, len(prompt_ids) :]  # fmt: skip
        self._rest()
        lengths = [self._length(completion) for completion in tokens.tolist()]
        completions = [completion[:length] for completion, length in zip(tokens.tolist(), lengths, strict=True)]
        self.metrics_queue.put(
            {
                "rollout/generated_tok_s": (float(sum(lengths)), time.monotonic() - started),
                "completions/mean_length": (float(sum(lengths)), float(len(lengths))),
                "completions/max_length": float(max(lengths)), "completions/min_length": float(min(lengths)),
            }
        )  # fmt: skip
        for sample in self._scored(group, row, prompt_ids, completions, sampling):
            self._put(sample)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(text=prompt)["input_ids"])
        return list(self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))

    def _length(self, completion: list[int]) -> int:
        return next((place + 1 for place, token in enumerate(completion) if token in self._ends), len(completion))

    def _scored(
        self, group: int, row: dict[str, Any], prompt_ids: list[int], completions: list[list[int]], sampling: _Sampling
    ) -> list[RolloutSample]:
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        is_text = isinstance(row["prompt"], str)
        messages = [text if is_text else [{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [value] * self._count for name, value in row.items() if name not in ("prompt", "completion")}
        columns |= {"prompts": [row["prompt"]] * self._count, "completions": messages, "completion_ids": completions}
        by_function = [_called(reward, columns) for reward in self._reward_funcs]
        names = [f"rewards/{get_callable_name(reward)}" for reward in self._reward_funcs]
        rewards, advantages, deviation = _summed(by_function)
        log_probs, versions = torch.stack(sampling.log_probs, dim=1).tolist(), sampling.versions
        untrained = [0] * len(prompt_ids)
        return [
            RolloutSample(
                prompt=row["prompt"], completion=messages[place],
                input_ids=np.array(prompt_ids + completion, np.int64),
                completion_mask=np.array(untrained + [1] * len(completion), np.int64),
                old_log_probs=np.array(untrained + log_probs[place][: len(completion)], np.float32),
                advantage=advantages[place], model_version=versions[0], group_id=group,
                metrics={
                    "reward": rewards[place], "reward_std": deviation,
                    **dict(zip(names, [found[place] for found in by_function], strict=True)),
                    GROUP_ROWS: float(self._count), VERSION_END: float(versions[len(completion) - 1]),
                },
            )
            for place, completion in enumerate(completions)
        ]  # fmt: skip

    def _put(self, sample: RolloutSample) -> None:
        sample.enqueued_at = time.time()
        self._wait(lambda: not self.rollout_buffer.full())  # nobody else puts
        self.rollout_buffer.put_nowait(sample)

    def _wait_until_allowed(self, group: int) -> None:
        self._wait(lambda: group < self._allowed)

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._turn:
            while not ready():
                self._live()
                self._turn.wait(WAIT_SECONDS)
            self._live()

    def _live(self) -> None:
        if self._stopping:
            raise _Stopped
        self._sign_of_life = time.monotonic()

    def _rest(self) -> None:
        with self._turn:
            self._busy = False
            self._turn.notify_all()

    def _between_tokens(self) -> int:
        """Let new weights in, if some wait; return the version that the next token is computed with."""
        with self._turn:
            self._busy = False
            self._turn.notify_all()
            while self._updating:
                self._live()
                self._turn.wait(WAIT_SECONDS)
            self._live()
            self._busy = True
            return self.model_version


class _Stopped(BaseException):
    """Ends generation."""


class _Sampling(LogitsProcessor):
    """Samples by itself, and leaves `generate` no choice: no other thread's random numbers are touched.

    Args:
        temperature: that logits are divided by.
        generator: of random numbers.
        between_tokens: is called before each token, and tells which version of the weights it is computed with.

    Attributes:
        log_probs: of the sampled tokens, [rollouts] for each token.
        versions: of the weights, for each token.
    """

    def __init__(self, temperature: float, generator: torch.Generator, between_tokens: Callable[[], int]) -> None:
        self.log_probs: list[Tensor] = []
        self.versions: list[int] = []
        self._temperature, self._generator, self._between_tokens = temperature, generator, between_tokens
        self._version = between_tokens()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rollouts, vocabulary] to the same, where one token alone is possible."""
        log_probs = (scores.float() / self._temperature).log_softmax(-1)
        tokens = torch.multinomial(log_probs.exp(), 1, generator=self._generator)
        self.log_probs.append(log_probs.gather(-1, tokens)[:, 0])
        self.versions.append(self._version)
        self._version = self._between_tokens()
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)


def _called(reward: Callable[..., Any], columns: dict[str, Any]) -> list[float]:
    found = reward(**columns)
    if is_async_callable(reward):
        found = asyncio.run(found)
    if len(found) != len(columns["prompts"]):
        raise ValueError(f"{get_callable_name(reward)}: gave {len(found)} rewards for {len(columns['prompts'])}")
    return [math.nan if value is None else float(value) for value in found]


def _summed(by_function: list[list[float]]) -> tuple[list[float], list[float], float]:
    """Rewards, NaN where no function gave one; advantages as of TRL's worker; the rewards' standard deviation."""
    found = np.array(by_function)  # [functions, rollouts]
    unknown = np.isnan(found).all(0)
    rewards = np.where(unknown, np.nan, np.nansum(found, 0))
    if unknown.all():
        return rewards.tolist(), [0.0] * len(rewards), math.nan
    deviation = float(rewards[~unknown].std())
    advantages = np.where(unknown, 0.0, (rewards - rewards[~unknown].mean()) / (deviation + 1e-8))
    return rewards.tolist(), advantages.tolist(), deviation
