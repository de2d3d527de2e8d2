"""What is checked and measured of `seq_is_stats`; log-probabilities are in float32 or better, as learners have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.seq_is_stats import seq_is_stats


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Sequences of random lengths; what does not count is NaN or infinite, and a little of the rest NaN."""
    shape = sequences, tokens = knobs["sequences"], knobs["tokens"]
    sampler = -torch.rand(shape, generator=generator).exp()
    learner = sampler + knobs["spread"] * torch.randn(shape, generator=generator)
    lengths = torch.randint(0, tokens + 1, (sequences, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    sampler[torch.rand(shape, generator=generator) < 0.01] = math.nan
    learner[~mask], sampler[~mask] = math.nan, math.inf
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "log_probs": learner.to(device, wide), "sampler_log_probs": sampler.to(device, wide), "mask": mask.to(device),
        "truncation": knobs["truncation"],
    }  # fmt: skip


def _oracle(arguments: Arguments) -> tuple[Tensor, ...]:
    """Sequence by sequence, of the tokens that count alone."""
    learner, sampler = (arguments[name].double().cpu() for name in ("log_probs", "sampler_log_probs"))
    ratios = [(a[m] - b[m]).nan_to_num(0) for a, b, m in zip(learner, sampler, arguments["mask"].cpu(), strict=True)]
    log_ratios = torch.stack([r.sum() for r in ratios])
    k3 = torch.stack([(r.expm1() - r).sum() / max(len(r), 1) for r in ratios])
    geometric_mean = torch.stack([(r.sum() / max(len(r), 1)).exp() for r in ratios])
    counts = torch.tensor([len(r) for r in ratios])
    sizes = []
    for limit in (math.inf, arguments["truncation"] or math.inf):
        weights = log_ratios.clamp(max=math.log(limit)).softmax(dim=0)
        sizes.append(-weights.square().sum().log())
    return log_ratios, k3, geometric_mean, counts, *sizes


def _cost(knobs: Mapping[str, Any]) -> Cost:
    tokens = knobs["sequences"] * knobs["tokens"]
    return Cost(9 * tokens, 30 * tokens)


OPERATION = Operation(
    name="seq_is_stats",
    function=seq_is_stats,
    example=_example,
    oracle=_oracle,
    shapes=(
        {"sequences": 5, "tokens": 9, "spread": 0.3, "truncation": 8.0},
        {"sequences": 1, "tokens": 1, "spread": 1.0, "truncation": None},
        {"sequences": 3, "tokens": 1100, "spread": 0.01, "truncation": 1.01},
        {"sequences": 2, "tokens": 2048, "spread": 0.2, "truncation": 2.0},
        {"sequences": 1030, "tokens": 4, "spread": 2.0, "truncation": 1.5},
    ),
    large={"sequences": 2048, "tokens": 8192, "spread": 0.05, "truncation": 8.0},
    cost=_cost,
    tolerance={torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6},
)
