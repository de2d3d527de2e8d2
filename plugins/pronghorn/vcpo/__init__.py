"""VCPO: asynchronous reinforcement learning that stays stable when rollouts are many updates old.

For whoever trains language models with REINFORCE, RLOO or GRPO while other devices generate. Two things tame old
rollouts: a learning rate that follows the effective sample size, and a baseline that makes the off-policy gradient vary
least (Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs, arXiv 2602.17616).

    from pronghorn.vcpo import VCPOConfig, VCPOTrainer

    args = VCPOConfig("out", per_device_train_batch_size=8, num_generations=8, use_vllm=True)
    VCPOTrainer("Qwen/Qwen2.5-0.5B", reward, args, train_dataset=dataset).train()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.vcpo.config import VCPOSettings
    from pronghorn.vcpo.ess import ReferenceESS, effective_sample_size, learning_rate_scale, scaled_learning_rate
    from pronghorn.vcpo.ghost_norms import GhostNorms
    from pronghorn.vcpo.gradient import accumulate, accumulate_batched
    from pronghorn.vcpo.minibatch import Minibatch
    from pronghorn.vcpo.ranks import ProcessGroup
    from pronghorn.vcpo.records import Run, RunRecords, read_run
    from pronghorn.vcpo.step import StepMetrics, TrajectoryStats, vcpo_step
    from pronghorn.vcpo.trl.async_config import AsyncVCPOConfig
    from pronghorn.vcpo.trl.async_trainer import AsyncVCPOTrainer
    from pronghorn.vcpo.trl.callback import VCPOCallback
    from pronghorn.vcpo.trl.config import VCPOConfig
    from pronghorn.vcpo.trl.early_warning import EarlyWarning
    from pronghorn.vcpo.trl.trainer import VCPOTrainer

__all__ = [
    "AsyncVCPOConfig",
    "AsyncVCPOTrainer",
    "EarlyWarning",
    "GhostNorms",
    "Minibatch",
    "ProcessGroup",
    "ReferenceESS",
    "Run",
    "RunRecords",
    "StepMetrics",
    "TrajectoryStats",
    "VCPOCallback",
    "VCPOConfig",
    "VCPOSettings",
    "VCPOTrainer",
    "accumulate",
    "accumulate_batched",
    "effective_sample_size",
    "learning_rate_scale",
    "read_run",
    "scaled_learning_rate",
    "vcpo_step",
]

_ROOMS = {
    "AsyncVCPOConfig": "trl.async_config",
    "AsyncVCPOTrainer": "trl.async_trainer",
    "EarlyWarning": "trl.early_warning",
    "GhostNorms": "ghost_norms",
    "Minibatch": "minibatch",
    "ProcessGroup": "ranks",
    "ReferenceESS": "ess",
    "Run": "records",
    "RunRecords": "records",
    "StepMetrics": "step",
    "TrajectoryStats": "step",
    "VCPOCallback": "trl.callback",
    "VCPOConfig": "trl.config",
    "VCPOSettings": "config",
    "VCPOTrainer": "trl.trainer",
    "accumulate": "gradient",
    "accumulate_batched": "gradient",
    "effective_sample_size": "ess",
    "learning_rate_scale": "ess",
    "read_run": "records",
    "scaled_learning_rate": "ess",
    "vcpo_step": "step",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
