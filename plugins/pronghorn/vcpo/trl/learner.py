"""What a trainer of TRL does with all trajectories of an optimizer step: gradient, learning rate, records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pronghorn.files.json_files import differing, load_json, save_json
from pronghorn.trl.rollouts import PaddedRollouts, Rollout
from pronghorn.vcpo.config import GHOST, VCPOSettings
from pronghorn.vcpo.ess import MinibatchESS
from pronghorn.vcpo.gradient import Accumulated, accumulate, accumulate_batched
from pronghorn.vcpo.minibatch import Minibatch
from pronghorn.vcpo.ranks import Alone, ProcessGroup, Ranks
from pronghorn.vcpo.records import RunRecords
from pronghorn.vcpo.step import trajectory_stats
from pronghorn.vcpo.trl.scaling import ESSScaling
from pronghorn.versions import code_of, versions

STATE, FORMAT = "vcpo_state.json", 2
MADE_WITH = "made_with"  # in a state; those of before have none


class Learner:
    """The method within a trainer.

    Args:
        trainer: of TRL, whose model has a fused output layer. Its `args` are `VCPOSettings` too.
        pad_token_id: what padding is filled with.

    Attributes:
        scaling: of the learning rate; the trainer is to have it as a callback.

    Raises:
        ValueError: the trainer runs in a way that has no gradient norms.
    """

    def __init__(self, trainer: Any, pad_token_id: int) -> None:
        accelerator = trainer.accelerator
        kind = accelerator.distributed_type
        sharded = kind == DistributedType.FSDP
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (sharded and not accelerator.is_fsdp2):
            raise ValueError(f"accelerate: got {kind.value}, accepted are one process, DDP and FSDP of version 2")
        if sharded and trainer.args.opob_grad_norm != GHOST:
            raise ValueError("opob_grad_norm: got 'exact', which needs whole gradients; with FSDP wanted 'ghost'")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("fp16: got True; scaled losses have no gradient norms here, accepted are bf16 and float32")
        if trainer.aux_loss_enabled:
            raise ValueError("router_aux_loss_coef: the model has an auxiliary loss, which VCPO has not; set it to 0")
        self._trainer, self._args, self._pad = trainer, trainer.args, pad_token_id
        self._metrics = trainer._metrics["train"]
        alone = accelerator.num_processes == 1
        self._ranks: Ranks = Alone() if alone else ProcessGroup(accelerator.device)
        self.scaling = ESSScaling(self._args, self._ranks, self._metrics)
        self._records: RunRecords | None = None
        self._entropies: list[Tensor] = []

    def learn(self, model: nn.Module, rollouts: list[Rollout]) -> Tensor:
        """Give parameters the gradient of a step, its learning rate to the callback, and its records to the disk.

        Args:
            model: as it was prepared.
            rollouts: of this rank, groups side by side.

        Returns:
            The value of the loss, 0-dimensional.
        """
        policy = self._trainer.accelerator.unwrap_model(model)
        minibatch = minibatch_of(rollouts)
        if self._args.opob_grad_norm == GHOST:
            size, count = self._args.per_device_train_batch_size, len(rollouts)
            micro_batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
            log_probs = self._log_probs_of_some(policy, rollouts, minibatch)
            found = accumulate_batched(log_probs, policy, minibatch, self._args, micro_batches, self._ranks)
        else:
            learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            log_probs_of_one = self._log_probs_of_one(policy, rollouts, minibatch)
            found = accumulate(log_probs_of_one, learning, minibatch, self._args, self._ranks)
        for parameter, gradient in zip(found.parameters, found.gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        staleness = torch.tensor([self._trainer.state.global_step - rollout.policy_version for rollout in rollouts])
        ess = self.scaling.observe(found.statistics.log_ratios, int(self._ranks.gather(staleness).max()))
        self._record(found, ess, rollouts, minibatch)
        if self._entropies:
            self._metrics["entropy"].append(float(torch.stack(self._entropies).mean()))
            self._entropies.clear()
        return -(found.weights * minibatch.advantages.double().cpu()).mean().to(self._trainer.accelerator.device)

    def _log_probs_of_one(
        self, policy: nn.Module, rollouts: list[Rollout], minibatch: Minibatch
    ) -> Callable[[int], Tensor]:
        longest = minibatch.mask.shape[1]

        def log_probs_of(row: int) -> Tensor:
            rollout = rollouts[row]
            padded = PaddedRollouts.of([rollout], self._pad)
            labels = padded.input_ids.masked_fill(padded.attention_mask == 0, -100)
            labels[:, : -padded.completion_length] = -100
            with self._trainer.accelerator.autocast():
                outputs = policy(
                    input_ids=padded.input_ids, attention_mask=padded.attention_mask, labels=labels,
                    fused_lm_head=True, **rollout.forward,
                )  # fmt: skip
            missing = longest - padded.completion_length
            found, entropies = (
                F.pad(part[0, -padded.completion_length :], (0, missing))
                for part in (outputs.log_probs, outputs.entropy)
            )
            self._entropies.append(entropies.detach()[minibatch.mask[row]].mean())
            if rollout.sampler_log_probs is None:
                minibatch.sampler_log_probs[row] = found.detach()
            return found

        return log_probs_of

    def _log_probs_of_some(
        self, policy: nn.Module, rollouts: list[Rollout], minibatch: Minibatch
    ) -> Callable[[range], tuple[Tensor, Tensor]]:
        longest = minibatch.mask.shape[1]

        def log_probs_of(rows: range) -> tuple[Tensor, Tensor]:
            some = [rollouts[row] for row in rows]
            if any(rollout.forward for rollout in some):
                raise ValueError("opob_grad_norm: got 'ghost' with images, accepted is 'exact'")
            padded = PaddedRollouts.of(some, self._pad)
            length = padded.completion_length
            with self._trainer.accelerator.autocast():
                logits = policy(
                    input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False,
                    logits_to_keep=length + 1,
                ).logits[:, :-1]  # fmt: skip
            scaled = (logits.float() if logits.dtype != torch.float64 else logits) / self._trainer.temperature
            tokens = padded.input_ids[:, -length:, None]
            found = F.pad(scaled.gather(-1, tokens)[..., 0] - scaled.logsumexp(-1), (0, longest - length))
            for place, row in enumerate(rows):
                if rollouts[row].sampler_log_probs is None:
                    minibatch.sampler_log_probs[row] = found[place].detach()
            numbers = torch.arange(len(some), device=tokens.device)[:, None]
            return found, torch.where(padded.attention_mask.bool(), numbers, -1)

        return log_probs_of

    def _record(self, found: Accumulated, ess: MinibatchESS, rollouts: list[Rollout], minibatch: Minibatch) -> None:
        norm, step = _norm(found.gradients), self._trainer.state.global_step
        metrics = self._metrics
        metrics["vcpo/baseline"] += found.baselines
        own = [
            {
                "step": step, "uid": f"{rollout.group}-{number}", "group": str(rollout.group),
                "param_version_start": rollout.policy_version,
                "param_version_end": rollout.policy_version if (end := rollout.policy_version_end) is None else end,
                "trainer_version": step, "prompt_length": len(rollout.prompt_ids), "log_ratio": ratio,
                **{name: value for name, value in stats.to_dict().items() if name != "group"},
            }
            for number, (rollout, stats, ratio) in enumerate(
                zip(rollouts, trajectory_stats(found, minibatch, self._args),
                    found.statistics.log_ratios.tolist(), strict=True)
            )
        ]  # fmt: skip
        rows = self._gathered(own)
        ages = [row["trainer_version"] - row["param_version_start"] for row in rows]
        metrics["vcpo/staleness_mean"].append(sum(ages) / len(ages))
        if not self._args.save_records or not self._trainer.accelerator.is_main_process:
            return
        last = None if self._records is None else self._records.last_step
        if self._records is None or (last is not None and last >= step):
            # A run that goes on, or begins anew, is not told twice.
            self._records = RunRecords(self._args.output_dir)
            self._records.truncate(step - 1)
        rate = max(group["lr"] for group in self._trainer.optimizer.param_groups) * self.scaling.scale
        self._records.append(
            {
                "step": step, **asdict(ess), "ess_reference": metrics["vcpo/ess_reference"][-1],
                "learning_rate": rate, "learning_rate_scale": self.scaling.scale, "grad_norm": norm,
                "reward": sum(row["reward"] for row in rows) / len(rows), "staleness_mean": sum(ages) / len(ages),
                "staleness_max": max(ages), "trajectories": len(rows),
            },
            rows,
        )  # fmt: skip

    def _gathered(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._ranks.count == 1:
            return rows
        lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()  # torch.distributed unpickles its objects
        found = self._ranks.gather(torch.tensor([*lines], dtype=torch.uint8))
        return [json.loads(line) for line in bytes(found.tolist()).splitlines()]


def _norm(gradients: Sequence[Tensor]) -> float:
    parts = [gradient.norm() for gradient in gradients]
    return float(torch.stack([part.full_tensor() if isinstance(part, DTensor) else part for part in parts]).norm())


def save_state(folder: Path, config: Any, scaling: ESSScaling, **state: Any) -> None:
    """Write into a checkpoint what a run that goes on needs to know, and what else the trainer keeps."""
    save_json(folder / STATE, {**scaling.reference.state_dict(), **state, MADE_WITH: _made_with(config)}, format=FORMAT)


def load_state(folder: Path, config: Any, scaling: ESSScaling, **wanted: type) -> dict[str, Any]:
    """Take up what `save_state` wrote, and give it back, in which there are to be values of these types.

    Raises:
        FileNotFoundError: the checkpoint is not one of this method.
        ValueError: the file is damaged, or of a run with other settings, code or versions, and no `force_resume`.
    """
    state: dict[str, Any] = load_json(folder / STATE, newest=FORMAT)
    try:
        wrong = [name for name, kind in wanted.items() if type(state[name]) is not kind]
        if wrong:
            raise ValueError(f"{wrong[0]}: got {state[wrong[0]]!r}")
        made_with = dict(state.pop(MADE_WITH, {}))
        scaling.reference.load_state_dict(state)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / STATE}: no state of this method's training: {error!r}") from error
    other = differing(made_with, _made_with(config))
    if other and not config.force_resume:
        raise ValueError(f"{folder}: is of another run: {'; '.join(other)}. To go on nevertheless, set force_resume")
    return state


def _made_with(config: Any) -> dict[str, Any]:
    """What is to be the same when a run goes on; of TRL's own settings TRL takes any."""
    names = [*(entry.name for entry in fields(VCPOSettings)), "estimator", "lag", "max_staleness"]
    settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {
        **settings, "code": code_of(load_state, VCPOSettings),
        **versions(("torch", "transformers", "trl", "pronghorn")),
    }  # fmt: skip


def load_rollout_state(path: Path) -> dict[str, Any]:
    """What an asynchronous trainer wrote of its place among the prompts, and of what it has counted.

    Raises:
        FileNotFoundError: the checkpoint is not one of this method.
        ValueError: the file is damaged.
    """
    state = load_json(path, newest=FORMAT)
    counts = ("prompt_index", "trained", "dropped", "model_version")
    whole = isinstance(state, dict) and all(_is_count(state.get(name)) for name in counts)
    if not whole or not isinstance(state.get("beyond"), list) or not all(map(_is_count, state["beyond"])):
        raise ValueError(f"{path}: wanted beyond, a list of prompts, and {', '.join(counts)}, all whole numbers")
    return {name: state[name] for name in ("beyond", *counts)}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def minibatch_of(rollouts: Sequence[Rollout]) -> Minibatch:
    """What the method must know of some rollouts, padded; zeros stand for log-probabilities of the learner itself.

    Raises:
        ValueError: as of `Minibatch`.
    """
    device = rollouts[0].completion_ids.device
    longest = max(1, *(len(rollout.completion_ids) for rollout in rollouts))
    sampler = torch.zeros(len(rollouts), longest, device=device)
    mask = torch.zeros(len(rollouts), longest, dtype=torch.bool, device=device)
    for row, rollout in enumerate(rollouts):
        mask[row, : len(rollout.sampled)] = rollout.sampled
        if rollout.sampler_log_probs is not None:
            sampler[row, : len(rollout.sampled)] = rollout.sampler_log_probs
    groups = torch.tensor([rollout.group for rollout in rollouts])
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    for group in groups[rewards.isnan()].unique():
        members = groups == group
        known = rewards[members & ~rewards.isnan()]
        missing = members & rewards.isnan()
        rewards[missing] = known.mean() if len(known) else 0.0
        mask[missing.to(device)] = False
    advantages = torch.tensor([rollout.advantage for rollout in rollouts])
    return Minibatch(sampler, mask, rewards.to(device), advantages.to(device), groups.to(device))
