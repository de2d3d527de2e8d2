"""The configuration of VCPO's asynchronous trainer: TRL's and the method's settings side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.experimental.async_grpo import AsyncGRPOConfig

from pronghorn.vcpo.config import VCPOSettings
from pronghorn.vcpo.trl.config import check, refuse_unused

# Settings of AsyncGRPOConfig that only TRL's own loss and packing read.
OF_TRLS_LOSS = ("epsilon", "epsilon_high", "token_budget")


@dataclass
class AsyncVCPOConfig(VCPOSettings, AsyncGRPOConfig):
    """Everything of `AsyncGRPOConfig` and `VCPOSettings`, and what follows.

    An optimizer step learns from `per_device_train_batch_size * gradient_accumulation_steps` rollouts of each process,
    whole groups of `num_generations`. With `opob_grad_norm="ghost"`, `per_device_train_batch_size` is the number of
    rollouts in one forward; with "exact" each has a forward of its own.

    Attributes:
        max_staleness: k of the paper: weights that the sampler may be behind. A rollout's first token is from weights
            at most `(max_staleness + 1) * weight_sync_steps - 1` updates old at the update that learns from it, which
            is `max_staleness` where weights are handed over after each; 0 samples and learns in turn.
        max_inflight_tasks: rollouts that are generated at once; -1 is as many as may be outstanding: those of
            `(max_staleness + 1) * weight_sync_steps` optimizer steps.
        queue_maxsize: rows that wait in the worker's queue at most; -1 is the same.
        ess_reference: as a number or "auto", a string here so that the command line takes both.
        attn_implementation: of the learner's model; TRL's trainer needs a kernel for GPUs, which this one does not.
        save_records: write `vcpo_stats.jsonl` and `vcpo_steps.jsonl` to `output_dir`, for `pronghorn vcpo report`.
        force_resume: go on from a checkpoint that was made with other settings of this method, other code, or other
            versions of torch, transformers, TRL or Pronghorn.

    Raises:
        ValueError, TypeError: a value is not accepted, is of no use, or an optimizer step does not hold whole groups.
    """

    max_inflight_tasks: int = field(
        default=-1, metadata={"help": "Rollouts generated at once; -1: as many as may be outstanding."}
    )
    queue_maxsize: int = field(
        default=-1, metadata={"help": "Rows in the worker's queue at most; -1: as many as may be outstanding."}
    )
    ess_reference: str = field(
        default="1.0", metadata={"help": "Share of effective samples at which the rate is whole, or 'auto'."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention of the learner's model."})
    save_records: bool = field(default=True, metadata={"help": "Write records for `pronghorn vcpo report`."})
    force_resume: bool = field(
        default=False, metadata={"help": "Go on from a checkpoint of other settings, code or versions."}
    )

    to_dict = AsyncGRPOConfig.to_dict

    def __post_init__(self) -> None:
        AsyncGRPOConfig.__post_init__(self)
        check(self)
        refuse_unused(self, AsyncGRPOConfig, OF_TRLS_LOSS)
        for name, least in (("max_staleness", 0), ("weight_sync_steps", 1), ("num_generations", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if rows % self.num_generations or self.groups_per_step < self.world_size:
            raise ValueError(
                f"num_generations: got {self.num_generations} with {rows} rollouts in an optimizer step "
                "(per_device_train_batch_size * gradient_accumulation_steps * processes), wanted whole groups, and one "
                f"at least for each of {self.world_size} processes"
            )
        for name in ("max_inflight_tasks", "queue_maxsize"):
            if getattr(self, name) < 0:
                setattr(self, name, rows * (self.max_staleness + 1) * self.weight_sync_steps)

    @property
    def groups_per_step(self) -> int:
        """Groups that an optimizer step learns from, on all processes."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        return rows // self.num_generations

    @property
    def max_age(self) -> int:
        """Updates that a rollout's first weights may be behind."""
        return (self.max_staleness + 1) * self.weight_sync_steps - 1
