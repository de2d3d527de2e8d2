"""Rollouts of weights that are some updates old, as an asynchronous sampler's are, for experiments in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pronghorn.files.json_files import load_json, save_json
from pronghorn.files.tensor_files import load_tensors, save_tensors
from pronghorn.trl.rollouts import PaddedRollouts, Rollout

WEIGHTS, VERSIONS = "lagged_sampler.safetensors", "lagged_sampler.json"
FORMAT = 2  # of both


class LaggedSampler(TrainerCallback):
    """A `rollout_func` of `GRPOTrainer` that samples with the weights of `lag` updates ago.

        sampler = LaggedSampler(8)
        trainer = GRPOTrainer(..., rollout_func=sampler, callbacks=[sampler])

    It keeps lag + 1 copies of what learns. In the first updates, it samples with the oldest weights that there are.
    It takes no tools and no images.

    Args:
        lag: updates between a rollout's weights and the learner's, at the first update that uses the rollout.

    Raises:
        ValueError, TypeError: `lag` is no whole number of at least 0.
    """

    def __init__(self, lag: int) -> None:
        if not isinstance(lag, int) or isinstance(lag, bool):
            raise TypeError(f"lag: got {lag!r}, wanted a whole number")
        if lag < 0:
            raise ValueError(f"lag: got {lag}, wanted a whole number of at least 0")
        self.lag = lag
        self._snapshots: deque[tuple[int, list[Tensor]]] = deque(maxlen=lag + 1)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Completions of prompts, which are repeated already; with `policy_version`, the weights' age."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not self._snapshots:
            self._keep(model, trainer.state.global_step)
        version, weights = self._snapshots[0]
        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError("prompts: got images, which a sampler with lag does not take")
        generations = trainer.num_generations if model.training else trainer.num_generations_eval
        with _swapped(_learning(model), weights):
            if trainer.use_vllm:
                trainer._last_loaded_step = -1  # vLLM is to get these weights
            completion_ids, log_probs = trainer._generate_single_turn(prompt_ids, images, fields, generations)
            if log_probs is None:
                log_probs = _log_probs(trainer, prompt_ids, completion_ids)
        versions = [version] * len(prompts)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": log_probs,
                "policy_version": versions}  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the weights at the start."""
        if not self._snapshots:
            self._keep(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the weights of this update."""
        self._keep(model, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the copies with the checkpoint."""
        if state.is_world_process_zero:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def save(self, folder: str | Path) -> None:
        """Save the copies in a folder."""
        tensors = {f"{number}.{place}": weight for number, (_, weights) in enumerate(self._snapshots)
                   for place, weight in enumerate(weights)}  # fmt: skip
        save_tensors(Path(folder) / WEIGHTS, tensors, format=FORMAT)
        versions = [version for version, _ in self._snapshots]
        save_json(Path(folder) / VERSIONS, {"versions": versions}, format=FORMAT)

    def load(self, folder: str | Path, model: torch.nn.Module) -> None:
        """What `save` saved.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: they are damaged, or of another model.
        """
        file = Path(folder) / WEIGHTS
        learning, tensors = _learning(model), load_tensors(file, newest=FORMAT)[0]
        versions = _versions(Path(folder) / VERSIONS)
        wanted = {f"{number}.{place}": parameter for number in range(len(versions))
                  for place, parameter in enumerate(learning)}  # fmt: skip
        if set(tensors) != set(wanted):
            missing, strange = (", ".join(sorted(names)) or "none" for names in
                                (wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()))  # fmt: skip
            raise ValueError(
                f"{file}: wanted {len(versions)} copies of each of {len(learning)} weights; missing are {missing}, and "
                f"not among them are {strange}"
            )
        for name, parameter in wanted.items():
            found = tensors[name]
            if (found.shape, found.dtype) != (parameter.shape, parameter.dtype) or not bool(found.isfinite().all()):
                raise ValueError(
                    f"{file}: {name}: got {found.dtype} {tuple(found.shape)}, or NaN or Inf in it, wanted finite "
                    f"{parameter.dtype} {tuple(parameter.shape)}"
                )
        self._snapshots.clear()
        for number, version in enumerate(versions):
            weights = [tensors[f"{number}.{place}"].to(learning[place].device) for place in range(len(learning))]
            self._snapshots.append((version, weights))

    def _keep(self, model: torch.nn.Module, version: int) -> None:
        self._snapshots.append((version, [parameter.detach().clone() for parameter in _learning(model)]))


def _versions(path: Path) -> list[int]:
    content = load_json(path, newest=FORMAT)
    versions = content.get("versions") if isinstance(content, dict) else content  # a list, before there were digests
    if not isinstance(versions, list) or not all(type(version) is int and version >= 0 for version in versions):
        raise ValueError(f"{path}: wanted the updates that each copy of the weights had seen")
    return versions


def _learning(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def _swapped(parameters: list[torch.nn.Parameter], weights: list[Tensor]) -> Iterator[None]:
    """Parameters with other weights."""
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        yield
    finally:
        for parameter, weight in zip(parameters, kept, strict=True):
            parameter.data = weight


def _log_probs(trainer: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[list[float]]:
    """Of each completion's tokens by the weights as they are, at the trainer's temperature."""
    device = trainer.accelerator.device
    rows = [
        Rollout(torch.tensor(prompt, device=device), torch.tensor(completion, device=device, dtype=torch.long),
                torch.ones(0), None, 0.0, 0.0, 0, 0)
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]  # fmt: skip
    padded = PaddedRollouts.of(rows, trainer._tokenizer.pad_token_id)
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, padded.input_ids, padded.attention_mask, padded.completion_length,
            batch_size=trainer.args.per_device_train_batch_size,
        )  # fmt: skip
    return [row[: len(completion)].tolist() for row, completion in zip(found, completion_ids, strict=True)]
