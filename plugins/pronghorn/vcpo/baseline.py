"""OPOB, the off-policy optimal baseline: the mean reward under the weights that make the gradient vary least."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.vcpo.config import EXACT, MEAN, MEDIAN, PAPER, REFERENCE, VCPOSettings
from pronghorn.vcpo.ratios import clipped_log_ratios, truncated_log_ratios

REFERENCE_EPSILON = 1e-8
TAIL = 0.05


def baseline_weights(score_norms: Tensor, log_ratios: Tensor, lengths: Tensor, config: VCPOSettings) -> Tensor:
    """How much each trajectory counts in the baseline of its scope.

    Computed from logarithms; save for the reference's they are divided by the largest, so that no ratio overflows.

    Args:
        score_norms: ‖∇ Σ log p‖ of each trajectory, without its ratio, [trajectories].
        log_ratios: of the sequences, not truncated, [trajectories].
        lengths: numbers of sampled tokens, [trajectories]; one without any weighs nothing.
        config: its `opob_weight` and what belongs to it.

    Returns:
        float64 [trajectories].

    Raises:
        ValueError: a weight overflows, which only the reference's can.
    """
    log_norms, log_ratios = score_norms.double().log(), log_ratios.double()
    log_lengths = lengths.double().clamp(min=1).log()
    logs = log_norms if config.opob_weight == PAPER else log_norms + truncated_log_ratios(log_ratios, config)
    if config.opob_weight == EXACT:
        logs = logs - log_lengths
    else:
        if config.use_is_weights:
            logs = logs + (clipped_log_ratios(log_ratios, config) if config.use_clipped_is_ratios else log_ratios)
        if config.normalize_by_length:
            logs = logs - log_lengths
    logs = 2 * logs
    if config.opob_weight != REFERENCE and logs.max() > -torch.inf:
        logs = logs - logs.max()
    weights = logs.exp()
    if not weights.isfinite().all():
        raise ValueError("log_ratios: the reference's weights overflow; opob_weight='paper' cannot")
    return weights


def baseline(values: Tensor, weights: Tensor, config: VCPOSettings) -> float:
    """The baseline of one scope, 0 where nothing weighs anything.

    Args:
        values: rewards or advantages, [trajectories].
        weights: of `baseline_weights`, [trajectories].
        config: its `opob_aggregation`; with `opob_weight="reference"` divisors are larger by 1e-8.

    Raises:
        ValueError: shapes differ, or a weight is negative or not finite.
    """
    if values.shape != weights.shape or values.dim() != 1:
        raise ValueError(f"weights: got {list(weights.shape)}, wanted [trajectories] as values' {list(values.shape)}")
    if not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError("weights: got a negative number, NaN or infinity, wanted finite numbers of at least 0")
    values, weights = values.double(), weights.double()
    epsilon = REFERENCE_EPSILON if config.opob_weight == REFERENCE else 0.0
    if not weights.sum() > 0:
        return 0.0
    if config.opob_aggregation == MEAN:
        return _mean(values, weights, epsilon)
    if config.opob_aggregation == MEDIAN:
        return _quantile(values, weights, 0.5)
    low, high = _quantile(values, weights, TAIL), _quantile(values, weights, 1 - TAIL)
    return _mean(values.clamp(low, high), weights, epsilon)


def _mean(values: Tensor, weights: Tensor, epsilon: float) -> float:
    return float((weights * values).sum() / (weights.sum() + epsilon))


def _quantile(values: Tensor, weights: Tensor, share: float) -> float:
    """The first value, from below, at which the weights so far reach a share of all."""
    values, order = values.sort()
    reached = weights[order].cumsum(0) >= share * weights.sum()
    return float(values[int(reached.int().argmax())])
