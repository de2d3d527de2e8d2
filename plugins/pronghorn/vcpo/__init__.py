"""VCPO: asynchronous reinforcement learning that stays stable when rollouts are many updates old.

For whoever trains language models with REINFORCE, RLOO or GRPO while other devices generate. Two things tame old
rollouts: a learning rate that follows the effective sample size, and a baseline that makes the off-policy gradient vary
least (Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs, arXiv 2602.17616).

    from pronghorn.vcpo import ReferenceESS, VCPOSettings, accumulate, vcpo_step

    config = VCPOSettings()
    reference = ReferenceESS(config)
    found = accumulate(log_probs_of, list(model.parameters()), minibatch, config)
    metrics = vcpo_step(found, optimizer, minibatch, config, reference, staleness=12)
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
    from pronghorn.vcpo.step import StepMetrics, TrajectoryStats, vcpo_step

__all__ = [
    "GhostNorms",
    "Minibatch",
    "ReferenceESS",
    "StepMetrics",
    "TrajectoryStats",
    "VCPOSettings",
    "accumulate",
    "accumulate_batched",
    "effective_sample_size",
    "learning_rate_scale",
    "scaled_learning_rate",
    "vcpo_step",
]

_ROOMS = {
    "GhostNorms": "ghost_norms",
    "Minibatch": "minibatch",
    "ReferenceESS": "ess",
    "StepMetrics": "step",
    "TrajectoryStats": "step",
    "VCPOSettings": "config",
    "accumulate": "gradient",
    "accumulate_batched": "gradient",
    "effective_sample_size": "ess",
    "learning_rate_scale": "ess",
    "scaled_learning_rate": "ess",
    "vcpo_step": "step",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
