"""Pictures and a summary of a run, from its records."""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.vcpo.diagnosis import (
    BLUES,
    FEW,
    TAIL,
    TRUNCATION,
    Signature,
    by_staleness,
    largest_shares,
    log_ratios_of,
    running_median,
    signs_of,
    staleness_ranges,
    summarize,
    survival,
    tail_index,
)
from pronghorn.vcpo.records import Run, encoded, read_run

SUMMARY = "summary.json"


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
        logs = log_ratios_of(run, *row["staleness"]) / math.log(10)
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
    every = log_ratios_of(run)
    left = min(float(np.quantile(every, 0.2)) / math.log(10), -0.5)
    right = max(float(every.max()) / math.log(10), math.log10(truncation))
    ranges = staleness_ranges(run.staleness[np.isfinite(run.trajectories["log_ratio"])], len(BLUES))
    parts = [(f"staleness {_range(*found)}", log_ratios_of(run, *found)) for found in ranges]
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
