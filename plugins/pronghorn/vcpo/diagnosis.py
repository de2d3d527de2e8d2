"""What a run's records say of it: effective samples by staleness, tails of ratios, early signs of a collapse.

Ratios overflow where their logarithms do not, so everything here is computed from `log_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronghorn.vcpo.records import Run

TRUNCATION = 8.0  # the paper's
TAIL = 0.05  # share of the largest ratios that the tail index is taken from
FEWEST_IN_TAIL = 10  # below that many, it says nothing
HEAVIEST = 0.01  # share of the trajectories whose part of all weight is told
FEW = 30  # trajectories, below which an effective sample size is drawn as uncertain
BLUES = ("#a6cee3", "#6baed6", "#3182bd", "#08519c")


@dataclass(frozen=True)
class Signature:
    """The early sign of a collapse: effective samples drop, and soon after the gradient's norm leaps.

    Attributes:
        window: so many steps before a step give the medians that it is compared with; from 5 of them on.
        ess_drop: an ESS ratio below this share of its median is a drop.
        norm_spike: a gradient's norm above this multiple of its median, or one that is not finite, is a spike.
        horizon: a drop warned of a spike that came at most so many steps later, not in the same step, and that was
            the first in so many steps: what drops while the gradient leaps already warns of nothing.

    Raises:
        ValueError: a number is out of range.
    """

    window: int = 20
    ess_drop: float = 0.5
    norm_spike: float = 3.0
    horizon: int = 10

    def __post_init__(self) -> None:
        if self.window < 5 or self.horizon < 1:
            raise ValueError(f"window, horizon: got {self.window}, {self.horizon}, wanted at least 5 and 1")
        if not 0 < self.ess_drop < 1:
            raise ValueError(f"ess_drop: got {self.ess_drop}, wanted a number between 0 and 1")
        if not 1 < self.norm_spike < math.inf:
            raise ValueError(f"norm_spike: got {self.norm_spike}, wanted a number above 1")


@dataclass(frozen=True)
class Signs:
    """What was found of a signature.

    Attributes:
        drops: of the ESS ratio, bool [steps].
        spikes: of the gradient's norm, bool [steps].
        warnings: pairs of the indices of a drop and of the spike that it warned of.
    """

    drops: NDArray[Any]
    spikes: NDArray[Any]
    warnings: list[tuple[int, int]]


def ess_ratio(log_ratios: NDArray[Any]) -> float:
    """Effective samples over samples, of ratios w of any size.

    Args:
        log_ratios: log w, finite, [trajectories].
    """
    import torch

    from pronghorn.vcpo.ess import effective_sample_size

    return effective_sample_size(torch.from_numpy(np.ascontiguousarray(log_ratios))) / len(log_ratios)


def heaviest_share(log_ratios: NDArray[Any], share: float = HEAVIEST) -> float:
    """How much of Σw the largest ratios hold.

    Args:
        log_ratios: log w, finite, [trajectories].
        share: of the trajectories that count as largest, rounded up to at least one; 0 for the single largest.
    """
    ordered = np.sort(log_ratios)[::-1]
    count = max(1, math.ceil(share * len(ordered)))
    return float(np.exp(np.logaddexp.reduce(ordered[:count]) - np.logaddexp.reduce(ordered)))


def hill_tail_index(log_ratios: NDArray[Any], count: int) -> float:
    """Hill's estimator of the k in P(ratio > w) ~ w^-k: below 2 the variance of ratios is infinite, below 1 their mean.

    Args:
        log_ratios: log w, finite, [trajectories].
        count: how many of the largest make up the tail; below the number of trajectories.

    Returns:
        Infinity where the tail has no spread, as without lag.

    Raises:
        ValueError: `count` is out of range.

    Source: Hill, A Simple General Approach to Inference About the Tail of a Distribution (1975).
    """
    if not 0 < count < len(log_ratios):
        raise ValueError(f"count: got {count}, wanted a number from 1 to below the {len(log_ratios)} trajectories")
    ordered = np.sort(log_ratios)[::-1]
    excess = float((ordered[:count] - ordered[count]).mean())
    return 1 / excess if excess > 0 else math.inf


def tail_index(log_ratios: NDArray[Any]) -> float:
    """Hill's estimator from the largest 5 %; NaN of trajectories too few to tell."""
    count = math.ceil(TAIL * len(log_ratios))
    return hill_tail_index(log_ratios, count) if count >= FEWEST_IN_TAIL else math.nan


def survival(log_ratios: NDArray[Any], points: int = 1000) -> tuple[NDArray[Any], NDArray[Any]]:
    """The empirical P(ratio ≥ w): log w in ascending order and its probability, at about `points` ratios.

    They are dense where ratios are large: the last hundred are all there, and the smallest.
    """
    ordered, total = np.sort(log_ratios), len(log_ratios)
    places = np.r_[np.geomspace(1, total, points).round(), 1 : min(total, 100) + 1].astype(int)
    values = np.unique(ordered[total - places])
    return values, 1 - np.searchsorted(ordered, values) / total


def running_median(values: NDArray[Any], window: int, fewest: int = 5) -> NDArray[Any]:
    """The median of up to `window` values before each one; NaN where fewer than `fewest` are finite."""
    found = np.full(len(values), np.nan)
    for index in range(len(values)):
        before = values[max(0, index - window) : index]
        before = before[np.isfinite(before)]
        if len(before) >= fewest:
            found[index] = np.median(before)
    return found


def find_signs(steps: NDArray[Any], ess_ratios: NDArray[Any], grad_norms: NDArray[Any], signature: Signature) -> Signs:
    """Where a signature shows in a run.

    Args:
        steps: ascending numbers, [steps].
        ess_ratios: of each step; NaN, as where ratios overflowed, is a drop.
        grad_norms: of each step, before clipping.
        signature: what to look for.
    """
    usual, calm = (running_median(values, signature.window) for values in (ess_ratios, grad_norms))
    drops = np.isfinite(usual) & ~(ess_ratios >= signature.ess_drop * usual)
    spikes = (calm > 0) & ~(grad_norms <= signature.norm_spike * calm)
    places = np.flatnonzero(spikes)
    first = places[np.diff(steps[places], prepend=-math.inf) > signature.horizon]
    warnings = []
    for drop in np.flatnonzero(drops):
        distances = steps[first] - steps[drop]
        warned = first[(distances > 0) & (distances <= signature.horizon)]
        warnings += [(int(drop), int(warned[0]))] if len(warned) else []
    return Signs(drops, spikes, warnings)


def staleness_ranges(staleness: NDArray[Any], most: int) -> list[tuple[int, int]]:
    """At most `most` ranges, both ends included, that hold about as many trajectories each; single values if few."""
    values, counts = np.unique(staleness, return_counts=True)
    if len(values) <= most:
        return [(int(value), int(value)) for value in values]
    middles = (counts.cumsum() - counts / 2) / counts.sum()
    bins = (middles * most).astype(int)
    return [(int(values[bins == number][0]), int(values[bins == number][-1])) for number in np.unique(bins)]


def by_staleness(run: Run, ranges: list[tuple[int, int]], truncation: float = TRUNCATION) -> list[dict[str, Any]]:
    """A row for each range of staleness: what all its trajectories, of all steps, are worth together."""
    rewards, staleness = run.trajectories["reward"], run.staleness
    rows = []
    for low, high in ranges:
        logs = log_ratios_of(run, low, high)
        if len(logs):
            rows.append({
                "staleness": [low, high], "trajectories": len(logs), "ess_ratio": ess_ratio(logs),
                "ess_ratio_clipped": ess_ratio(logs.clip(max=math.log(truncation))),
                "truncated_share": float((logs > math.log(truncation)).mean()),
                "largest_share": heaviest_share(logs, 0),
                "reward": _mean(rewards[(staleness >= low) & (staleness <= high)]),
            })  # fmt: skip
    return rows


def largest_shares(run: Run) -> NDArray[Any]:
    """How much of its step's Σw the heaviest trajectory holds, [steps]; NaN where none has a finite ratio."""
    parts = np.split(run.trajectories["log_ratio"], run.steps["trajectories"].cumsum()[:-1])
    finite = [part[np.isfinite(part)] for part in parts]
    return np.array([heaviest_share(logs, 0) if len(logs) else math.nan for logs in finite])


def log_ratios_of(run: Run, low: int = 0, high: int | None = None) -> NDArray[Any]:
    """Finite log-ratios of a range of staleness."""
    logs, staleness = run.trajectories["log_ratio"], run.staleness
    found: NDArray[Any] = logs[np.isfinite(logs) & (staleness >= low) & (high is None or staleness <= high)]
    return found


def summarize(run: Run, truncation: float = TRUNCATION, signature: Signature | None = None) -> dict[str, Any]:
    """The figures of a run.

    Args:
        run: its records.
        truncation: the largest ratio in its loss.
        signature: of an early warning.

    Returns:
        For JSON; NaN where records allow no answer. Log-ratios that are not finite count in `not_finite` alone.

    Raises:
        ValueError: no step is whole, no log-ratio is finite, or `truncation` is not a positive number.
    """
    if not len(run.steps["step"]):
        raise ValueError(f"{run.folder}: the records hold no whole step")
    if not len(log_ratios_of(run)):
        raise ValueError(f"{run.folder}: the records hold no finite log_ratio")
    if not 0 < truncation < math.inf:
        raise ValueError(f"truncation: got {truncation}, wanted a positive number")
    steps, signs = run.steps["step"], signs_of(run, signature)
    logs, staleness, count = log_ratios_of(run), run.staleness, len(run.staleness)
    shares, ratios = largest_shares(run), run.steps["ess_ratio"]
    worst, heaviest = _place(ratios, np.nanargmin), int(np.nanargmax(shares))
    return {
        "steps": len(steps), "first_step": int(steps[0]), "last_step": int(steps[-1]),
        "trajectories": count, "not_finite": count - len(logs),
        "ess_ratio_mean": _mean(ratios), "ess_ratio_min": _at(ratios, worst), "ess_ratio_min_step": _at(steps, worst),
        "staleness_mean": float(staleness.mean()), "staleness_max": int(staleness.max()),
        "truncation": truncation, "truncated_share": float((logs > math.log(truncation)).mean()),
        "recorded_truncation": recorded_truncation(run), "log_ratio_max": float(logs.max()),
        "tail_index": tail_index(logs),
        "heaviest_share": heaviest_share(logs),
        "largest_share": float(shares[heaviest]), "largest_share_step": int(steps[heaviest]),
        "by_staleness": by_staleness(run, staleness_ranges(staleness, count), truncation),
        "ess_drops": steps[signs.drops].tolist(), "norm_spikes": steps[signs.spikes].tolist(),
        "warnings": [_warning(run, drop, spike) for drop, spike in signs.warnings],
    }  # fmt: skip


def recorded_truncation(run: Run) -> float | None:
    """The largest ratio that the run itself let into its loss; None where it truncated none."""
    columns = run.trajectories
    cut = columns["clipped_ratio"][columns["clipped_ratio"] < columns["ratio"]]
    return float(cut.max()) if len(cut) else None


def signs_of(run: Run, signature: Signature | None = None) -> Signs:
    """Where a signature shows in a run's records."""
    columns = run.steps
    return find_signs(columns["step"], columns["ess_ratio"], columns["grad_norm"], signature or Signature())


def _warning(run: Run, drop: int, spike: int) -> dict[str, Any]:
    steps = run.steps
    return {
        "step": int(steps["step"][drop]), "ess_ratio": float(steps["ess_ratio"][drop]),
        "spike_step": int(steps["step"][spike]), "spike_grad_norm": float(steps["grad_norm"][spike]),
    }  # fmt: skip


def _place(values: NDArray[Any], function: Callable[..., Any]) -> int | None:
    return int(function(values)) if not np.isnan(values).all() else None


def _at(values: NDArray[Any], place: int | None) -> Any:
    return math.nan if place is None else values[place].item()


def _mean(values: NDArray[Any]) -> float:
    """Of the numbers that are there."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
