"""`pronghorn vcpo …`: report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True)

ROWS = 16  # of the table by staleness


@app.callback()
def vcpo() -> None:
    """VCPO: reinforcement learning that stays stable when rollouts are old."""


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder with vcpo_stats.jsonl and vcpo_steps.jsonl of a run.")],
    output: Annotated[Path | None, typer.Option(help="Folder for pictures and summary.json; RUN by default.")] = None,
    truncation: Annotated[float, typer.Option(help="The largest ratio in the run's loss.")] = 8.0,
) -> None:
    """Diagnose RUN: effective samples by staleness, tails of ratios, early signs of a collapse."""
    from rich.console import Console
    from rich.table import Table

    from pronghorn.vcpo.report import SUMMARY, write_report

    summary, pictures = write_report(run, output, truncation)
    console = Console()
    figures = Table(show_header=False)
    for name, value in _figures(summary):
        figures.add_row(name, value)
    console.print(figures)
    rows = summary["by_staleness"]
    every = math.ceil(len(rows) / ROWS)
    table = Table("staleness", "trajectories", "ESS ratio", "truncated", "largest share", "reward")
    if every > 1:
        table.caption = f"one row of {every}; {SUMMARY} has all"
    for row in rows[::every]:
        low, high = row["staleness"]
        table.add_row(
            str(low) if low == high else f"{low} to {high}", str(row["trajectories"]), f"{row['ess_ratio']:.3f}",
            f"{row['truncated_share']:.1%}", f"{row['largest_share']:.1%}", f"{row['reward']:.3g}",
        )  # fmt: skip
    console.print(table)
    for path in (*pictures, pictures[0].parent / SUMMARY):
        typer.echo(path)


def _figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    own = found["recorded_truncation"]
    elsewhere = own is not None and not math.isclose(own, found["truncation"], rel_tol=1e-3)
    tail = found["tail_index"]
    return [
        ("steps", f"{found['steps']}, from {found['first_step']} to {found['last_step']}"),
        ("trajectories", str(found["trajectories"])),
        ("log-ratios not finite", str(found["not_finite"])),
        ("staleness", f"mean {found['staleness_mean']:.1f}, at most {found['staleness_max']}"),
        ("ESS ratio", f"mean {found['ess_ratio_mean']:.3f}"),
        ("lowest ESS ratio", f"{found['ess_ratio_min']:.3f} in step {found['ess_ratio_min_step']}"),
        ("ratios truncated", f"{found['truncated_share']:.1%}, at {found['truncation']:g}"),
        *([("", f"but the run itself truncated at {own:g}")] if elsewhere else []),
        (
            "tail index",
            "too few trajectories" if math.isnan(tail) else "no tail" if tail == math.inf else f"{tail:.2f}",
        ),
        *([("", "below 2: their variance is infinite")] if tail < 2 else []),
        ("largest 1 % of ratios", f"{found['heaviest_share']:.1%} of their sum"),
        ("largest ratio of a step", f"{found['largest_share']:.1%} of step {found['largest_share_step']}'s sum"),
        ("drops of the ESS", str(len(found["ess_drops"]))),
        ("spikes of the gradient", str(len(found["norm_spikes"]))),
        ("drops before spikes", _warnings(found["warnings"])),
    ]


def _warnings(found: list[dict[str, Any]]) -> str:
    if not found:
        return "none"
    first = found[0]
    return f"{len(found)}, first in step {first['step']}, before the spike in step {first['spike_step']}"
