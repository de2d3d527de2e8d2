"""Definition of the statistics of sequences' probability ratios."""

from __future__ import annotations

import torch
from torch import Tensor


def seq_is_stats(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios, k3, geometric means and counts of sequences, and both effective sample sizes; in float64."""
    ratios = log_probs.double() - sampler_log_probs.double()
    ratios = torch.where(mask & ~sampler_log_probs.isnan(), ratios, 0)
    counts = mask.sum(dim=1)
    log_ratios, tokens = ratios.sum(dim=1), counts.clamp(min=1)
    k3 = (ratios.expm1() - ratios).sum(dim=1) / tokens
    clipped = log_ratios if limit is None else log_ratios.clamp(max=limit)
    return log_ratios, k3, (log_ratios / tokens).exp(), counts, log_ess(log_ratios), log_ess(clipped)


def log_ess(log_ratios: Tensor) -> Tensor:
    """log of the effective number of samples, of all samples' log-ratios."""
    if not len(log_ratios):
        return log_ratios.new_full((), -torch.inf)
    return 2 * log_ratios.logsumexp(dim=0) - (2 * log_ratios).logsumexp(dim=0)
