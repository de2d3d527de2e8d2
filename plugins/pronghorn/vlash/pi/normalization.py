"""Scaling states and actions by the statistics of a data set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10, IDENTITY = "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY"
STATISTICS = {
    MEAN_STD: ("mean", "std"), MIN_MAX: ("min", "max"), QUANTILES: ("q01", "q99"), QUANTILE10: ("q10", "q90"),
    IDENTITY: (),
}  # fmt: skip
EPS = 1e-8


def normalize(x: Tensor, statistics: Mapping[str, Tensor], mode: str) -> Tensor:
    """To about -1 ... 1: (x - mean) / std, or -1 at the lower statistic and 1 at the upper.

    Args:
        x: [..., dim].
        statistics: [dim] each, under the names of `STATISTICS[mode]`.
        mode: "MEAN_STD", "MIN_MAX", "QUANTILES" (1 % and 99 %), "QUANTILE10" (10 % and 90 %) or "IDENTITY".

    Raises:
        ValueError: the mode is unknown or a statistic is missing.
    """
    if mode == IDENTITY:
        return x
    first, second = _statistics(x, statistics, mode)
    if mode == MEAN_STD:
        return (x - first) / (second + EPS)
    if mode == MIN_MAX:
        return (x - first) / (second - first + EPS) * 2 - 1
    return 2.0 * (x - first) / _spread(first, second) - 1.0


def unnormalize(x: Tensor, statistics: Mapping[str, Tensor], mode: str) -> Tensor:
    """Back from `normalize`. Where a coordinate never varied, MIN_MAX gives the value that it always had."""
    if mode == IDENTITY:
        return x
    first, second = _statistics(x, statistics, mode)
    if mode == MEAN_STD:
        return x * (second + EPS) + first
    if mode == MIN_MAX:
        return (x + 1) / 2 * (second - first) + first
    return (x + 1.0) * _spread(first, second) / 2.0 + first


def _statistics(x: Tensor, statistics: Mapping[str, Tensor], mode: str) -> list[Tensor]:
    if mode not in STATISTICS:
        raise ValueError(f"mode: got {mode!r}, accepted are {', '.join(STATISTICS)}")
    missing = [name for name in STATISTICS[mode] if name not in statistics]
    if missing:
        raise ValueError(f"statistics: got {', '.join(statistics)}; {mode} wants {', '.join(missing)} too")
    return [statistics[name].to(x) for name in STATISTICS[mode]]


def _spread(low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high == low, torch.full_like(low, EPS), high - low)
