"""Statistics of the probability ratios of whole sequences, learner's to sampler's, in one pass over their tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.seq_is_stats import reference

__all__ = ["SequenceStatistics", "seq_is_stats"]


class SequenceStatistics(NamedTuple):
    """What is known of each sequence, and of all.

    Attributes:
        log_ratios: float64 [sequences], s: the sum of r = log_probs - sampler_log_probs over a sequence's tokens.
        k3: float64 [sequences], the mean of exp(r) - r - 1 over its tokens; 0 for a sequence without any.
        geometric_mean: float64 [sequences], exp of the mean of r; 1 for a sequence without tokens.
        counts: int64 [sequences], how many tokens it has.
        log_ess: float64 [], log of (sum of exp(s))^2 / sum of exp(2 s), the effective number of sequences; -inf of no
            sequences.
        log_ess_clipped: float64 [], the same of ratios that are at most `truncation`.
    """

    log_ratios: Tensor
    k3: Tensor
    geometric_mean: Tensor
    counts: Tensor
    log_ess: Tensor
    log_ess_clipped: Tensor


def seq_is_stats(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, truncation: float | None = None
) -> SequenceStatistics:
    """Log-ratios of sequences, two measures of how far the learner is off, and effective sample sizes.

    Differences are in float32 or better and sums in float64, in the same order at every call; no ratio of a sequence
    is computed, so none overflows. Results have no gradient, and nothing is waited for.

    Args:
        log_probs: the learner's, [sequences, tokens] in fp16, bf16 or fp32 (fp64 in the reference).
        sampler_log_probs: [sequences, tokens], of any floating-point dtype. Where it is NaN, r is 0.
        mask: bool [sequences, tokens], which tokens count; what stands elsewhere does not matter, NaN neither.
        truncation: upper limit of a sequence's ratio for `log_ess_clipped`, or None for no limit.

    Returns:
        Finite for finite arguments, save for `k3` where an r is above 170, and `geometric_mean` where that is beyond
        float64. An infinite log-probability, or NaN of the learner, shows in the statistics of its sequence.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Kong, A Note on Importance Sampling using Standardized Weights (1992), for the effective sample size;
        Schulman, Approximating KL Divergence (2020), for k3.
    """
    check_tensor("log_probs", log_probs, dim=2, floating=True)
    check_tensor("sampler_log_probs", sampler_log_probs, floating=True, like=log_probs)
    check_shape("sampler_log_probs", sampler_log_probs, tuple(log_probs.shape))
    check_tensor("mask", mask, like=log_probs)
    check_shape("mask", mask, tuple(log_probs.shape))
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, wanted torch.bool")
    if truncation is not None and not 0 < truncation < math.inf:
        raise ValueError(f"truncation: got {truncation!r}, wanted a positive number or None")
    limit = None if truncation is None else math.log(truncation)
    return SequenceStatistics(*_operation(log_probs.detach(), sampler_log_probs.detach(), mask, limit))


def _forward(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 in (log_probs.dtype, sampler_log_probs.dtype)
    if use_triton("seq_is_stats", log_probs) and not exact and log_probs.numel() > 0:
        from pronghorn.kernels.seq_is_stats import triton

        return triton.seq_is_stats(log_probs, sampler_log_probs, mask, limit)
    return reference.seq_is_stats(log_probs.contiguous(), sampler_log_probs.contiguous(), mask.contiguous(), limit)


def _fake(log_probs: Tensor, *_: object) -> tuple[Tensor, ...]:
    sums = [log_probs.new_empty(log_probs.shape[0], dtype=torch.float64) for _ in range(3)]
    counts = log_probs.new_empty(log_probs.shape[0], dtype=torch.int64)
    return *sums, counts, *(log_probs.new_empty((), dtype=torch.float64) for _ in range(2))


_operation = define("seq_is_stats", _forward, _fake)
