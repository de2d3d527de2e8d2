"""What a run's records say of it: effective samples by staleness, tails of ratios, early signs of a collapse.

Ratios overflow where their logarithms do not, so everything here is computed from `log_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronghorn.vcpo.records import Run, encoded, read_run

SUMMARY = "summary.json"
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
        logs = _logs(run, low, high)
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


def _logs(run: Run, low: int = 0, high: int | None = None) -> NDArray[Any]:
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
    if not len(_logs(run)):
        raise ValueError(f"{run.folder}: the records hold no finite log_ratio")
    if not 0 < truncation < math.inf:
        raise ValueError(f"truncation: got {truncation}, wanted a positive number")
    steps, signs = run.steps["step"], signs_of(run, signature)
    logs, staleness, count = _logs(run), run.staleness, len(run.staleness)
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


def write_report(
    folder: Path | str, output: Path | str | None = None, truncation: float = TRUNCATION,
    signature: Signature | None = None,
) -> tuple[dict[str, Any], list[Path]]:  # fmt: skip
    """Write what `summarize` says of a run, and three pictures.

    Args:
        folder: of the run's records.
        output: folder for the files; the run's own by default.
        truncation: the largest ratio in its loss.
        signature: of an early warning.

    Returns:
        The summary, and the paths of the pictures.

    Raises:
        FileNotFoundError: the folder has no records.
        ValueError: they are damaged or empty, or `truncation` is not a positive number.
        ModuleNotFoundError: there is no matplotlib.
    """
    run = read_run(folder)
    summary = summarize(run, truncation, signature)
    figures = {
        "ess_by_staleness.png": draw_ess_by_staleness(run, truncation),
        "heavy_tails.png": draw_heavy_tails(run, truncation),
        "early_warning.png": draw_early_warning(run, signature),
    }
    target = Path(folder if output is None else output)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / SUMMARY, (encoded(summary) + "\n").encode())
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, format="png", dpi=130)
        _write(target / name, content.getvalue())
    return summary, [target / name for name in figures]


def draw_ess_by_staleness(run: Run, truncation: float = TRUNCATION) -> Any:
    """A figure: effective samples, ratios and numbers of trajectories by staleness."""
    figure = _figure(8, 8)
    ess, ratios, counts = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1.5))
    rows = by_staleness(run, staleness_ranges(run.staleness, 40), truncation)
    middles = np.array([sum(row["staleness"]) / 2 for row in rows])
    numbers = np.array([row["trajectories"] for row in rows])
    ess.plot(middles, [row["ess_ratio_clipped"] for row in rows], "--", color="C7", label="of truncated ratios")
    ess.plot(middles, [row["ess_ratio"] for row in rows], "o-", color="C0", label="of ratios")
    few = [(middle, row["ess_ratio"]) for middle, row in zip(middles, rows, strict=True) if row["trajectories"] < FEW]
    if few:
        label = f"fewer than {FEW} trajectories"
        ess.plot(*zip(*few, strict=True), "o", color="C0", markerfacecolor="white", label=label)
    ess.set(ylim=(-0.03, 1.05), ylabel="ESS / trajectories")
    _legend(ess, "Effective sample size of the trajectories of all steps", columns=3)
    for row, middle in zip(rows, middles, strict=True):
        logs = _logs(run, *row["staleness"]) / math.log(10)
        lowest, lower, median, upper, highest = np.quantile(logs, (0.05, 0.25, 0.5, 0.75, 0.95))
        ratios.vlines(middle, lowest, highest, color="C0", linewidth=1)
        ratios.vlines(middle, lower, upper, color="C0", linewidth=4)
        ratios.plot(middle, median, "o", color="C0", markerfacecolor="white", markersize=4)
    ratios.set_ylabel("ratio w")
    _mark_truncation(ratios.axhline, truncation)
    _tick_ratios(ratios.yaxis)
    _legend(ratios, "Ratios: median, middle half, 5 % to 95 %")
    counts.bar(middles, numbers, width=[0.8 + row["staleness"][1] - row["staleness"][0] for row in rows], color="C7")
    counts.set(xlabel="staleness, updates of the weights", ylabel="trajectories")
    _whole_numbers(counts)
    return figure


def draw_heavy_tails(run: Run, truncation: float = TRUNCATION) -> Any:
    """A figure: how often ratios are large, by staleness, and how much of each step its heaviest trajectory holds."""
    figure = _figure(12, 5)
    tails, shares = figure.subplots(1, 2)
    every = _logs(run)
    left = min(float(np.quantile(every, 0.2)) / math.log(10), -0.5)
    right = max(float(every.max()) / math.log(10), math.log10(truncation))
    ranges = staleness_ranges(run.staleness[np.isfinite(run.trajectories["log_ratio"])], len(BLUES))
    parts = [(f"staleness {_range(*found)}", _logs(run, *found)) for found in ranges]
    for (label, part), colour in zip([*parts, ("all", every)], [*BLUES[-len(parts) :], "black"], strict=True):
        logs, chances = survival(part)
        places, heights = np.r_[left, logs / math.log(10)], np.r_[1, chances]
        width = 2 if part is every else 1.2
        tails.plot(places, heights, color=colour, linewidth=width, drawstyle="steps-pre", label=label)
    if math.isfinite(index := tail_index(every)):
        ends = np.array([np.quantile(every, 1 - TAIL), every.max()])
        label = f"$w^{{-{index:.2f}}}$ (Hill, largest {TAIL:.0%})"
        tails.plot(ends / math.log(10), TAIL * np.exp(-index * (ends - ends[0])), "--", color="C1", label=label)
    tails.set(xlim=(left, right + 0.03 * (right - left)), yscale="log", ylim=(0.5 / len(every), 1.5))
    tails.set(xlabel="ratio w", ylabel="share of trajectories at or above w")
    _mark_truncation(tails.axvline, truncation)
    _tick_ratios(tails.xaxis)
    _legend(tails, "Tails of the ratios", columns=3)
    steps, found = run.steps["step"], largest_shares(run)
    shares.plot(steps, found, ".", color="C0", label="heaviest trajectory")
    shares.plot(steps, running_median(found, 20), color="C1", label="median of 20 steps before")
    shares.plot(steps, 1 / np.maximum(run.steps["trajectories"], 1), "--", color="C7", label="if all weighed alike")
    shares.set(ylim=(-0.02, 1.02), xlabel="step", ylabel="share of the sum of the step's ratios")
    _whole_numbers(shares)
    _legend(shares, "Weight of one trajectory in its step", columns=3)
    return figure


def draw_early_warning(run: Run, signature: Signature | None = None) -> Any:
    """A figure: effective samples, the gradient's norm, reward and learning rate over steps, with warnings marked."""
    signature, columns, steps = signature or Signature(), run.steps, run.steps["step"]
    signs, figure = signs_of(run, signature), _figure(9, 9)
    panels = figure.subplots(4, sharex=True)
    ess, norm, reward, scale = panels
    line: dict[str, Any] = {"color": "C0", "linewidth": 1, "marker": "." if len(steps) < FEW else ""}
    ess.plot(steps, columns["ess_ratio"], **line, label="step")
    ess.plot(steps, running_median(columns["ess_ratio"], signature.window), color="C7", label="median before")
    ess.plot(steps, columns["ess_reference"], ":", color="C2", label="reference")
    ess.plot(steps[signs.drops], columns["ess_ratio"][signs.drops], "v", color="C1", label="drop")
    norm.plot(steps, columns["grad_norm"], **line, label="step")
    norm.plot(steps[signs.spikes], columns["grad_norm"][signs.spikes], "x", color="C3", label="spike")
    reward.plot(steps, columns["reward"], **line)
    scale.plot(steps, columns["learning_rate_scale"], **line)
    for step in steps[signs.spikes & ~np.isfinite(columns["grad_norm"])]:
        norm.axvline(step, color="C3", linestyle=":")
    warned = np.zeros(len(steps), bool)
    for drop, spike in signs.warnings:
        warned[drop : spike + 1] = True
    for panel in panels:
        label = "from a warning to its spike" if warned.any() else None
        area = panel.get_xaxis_transform()
        panel.fill_between(steps, 0, 1, where=warned, transform=area, color="C1", alpha=0.25, linewidth=0, label=label)
    ess.set(ylim=(-0.03, 1.05), ylabel="ESS / trajectories")
    known = columns["grad_norm"][np.isfinite(columns["grad_norm"])]
    norm.set(yscale="log" if (known > 0).any() else "linear", ylabel="gradient norm")
    reward.set(ylabel="mean reward")
    scale.set(ylim=(-0.03, 1.05), xlabel="step", ylabel="learning rate, scale")
    _whole_numbers(scale)
    said = f"{signs.drops.sum()} drops of the ESS, {len(signs.warnings)} shortly before a spike of the gradient's norm"
    _legend(ess, said, columns=5)
    _legend(norm, "", columns=3)
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install matplotlib", name=error.name) from None
    return Figure(figsize=(width, height), layout="constrained")  # without pyplot, it needs no display


def _mark_truncation(line: Callable[..., Any], truncation: float) -> None:
    line(math.log10(truncation), color="C3", linestyle=":", label=f"truncation at {truncation:g}")


def _tick_ratios(axis: Any) -> None:
    """Ticks of an axis of decimal logarithms: one of the ratios themselves would overflow."""
    low, high = axis.get_view_interval()
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1, max(1, round((high - low) / 8)))
    ticks = [(power + math.log10(factor), factor, power) for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick[0] <= high]
    axis.set_ticks([place for place, _, _ in inside], [_ratio(factor, power) for _, factor, power in inside])


def _ratio(factor: int, power: int) -> str:
    if abs(power) < 3:
        return f"{factor * 10.0**power:g}"
    return f"$10^{{{power}}}$" if factor == 1 else f"${factor}\\times10^{{{power}}}$"


def _whole_numbers(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _legend(axes: Any, title: str, columns: int = 1) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(title=title, title_fontsize="large", fontsize="small", ncols=columns, loc="lower center",
                bbox_to_anchor=(0.5, 1.0), frameon=False)  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(content)
    partial.replace(path)
