"""Robots that follow targets while their policy computes: how much each method loses when that takes 0 to 4 steps.

Policies are flow-matching networks, trained here: without offsets, with them, and told them. `--policies` keeps them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from pronghorn.vlash.sweep import SweepRow, draw, over_delays, rollout, sweep
from pronghorn.vlash.tracking import TrackingEnvironment, TrackingTask

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
PICTURE, FILM = ASSETS / "vlash_tracking.png", ASSETS / "vlash_tracking.gif"
DELAYS, SEEDS = range(5), range(3)
FILMED = {"naive": "naive", "sync_real_time": "sync", "vlash+delay": "VLASH + delay"}
FILM_DELAY, FILM_SEED, FILM_STEPS, TAIL = 3, 0, 120, 12
SMOOTH = ("rtc", "rtc_full", "vlash", "vlash+delay")


def main() -> None:
    """Train what is not there, run all, write the results, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", type=Path, help="folder for trained policies")
    parser.add_argument("--train-steps", type=int, default=6000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = TrackingTask(train_steps=asked.train_steps, folder=asked.policies)
    rows = list(sweep(task, task.modes, DELAYS, SEEDS))
    _print(rows)
    _write(rows, task)
    draw(
        [row for row in rows if row.mode != "vlash+truth"], PICTURE, f"Tracking: means and ranges of {len(SEEDS)} seeds"
    )
    film(task)


def _print(rows: list[SweepRow]) -> None:
    for mode in dict.fromkeys(row.mode for row in rows):
        success = over_delays(rows, mode, "success").values()
        print(f"{mode:15}", "  ".join(f"{sum(seeds) / len(seeds):.3f}" for seeds in success))


def _write(rows: list[SweepRow], task: TrackingTask) -> None:
    from harness import row, write

    def seeds(mode: str, delay: int, name: str = "success") -> dict[str, float]:
        """The worst, the middle and the best."""
        low, middle, high = sorted(over_delays(rows, mode, name)[delay])
        return {"p20": low, "p50": middle, "p80": high}

    shape = "{} robots, {} seeds".format(task.about()["environments"], len(SEEDS))
    found: list[dict[str, Any]] = []

    def add(mode: str, against: str, delay: int, reach: float | None = None, note: str = "") -> None:
        found.append(
            row(f"success, {mode}, delay {delay}", f"{against}, delay {delay}", shape, seeds(mode, delay),
                seeds(against, delay), unit="success", higher_is_better=True, reach=reach, note=note)
        )  # fmt: skip

    notes = {
        "sync": "the world stands still while the robot waits", "sync_real_time": "the target moves on meanwhile",
        "roll_forward": "trained without offsets", "vlash+truth": "the true future state in place of the estimate",
        "expert": "plans from the same estimate, told the delay: the best that can be done with what was seen",
    }  # fmt: skip
    for mode in task.modes:
        for delay in DELAYS:
            add(mode, "naive", delay, 2.0 if mode == "vlash" and delay in (2, 3) else None, notes.get(mode, ""))
    for delay in DELAYS:
        add("vlash+delay", "vlash", delay, 1.0)
    for delay in (0, 1):
        add("vlash+delay", "sync", delay, 0.9, notes["sync"])
    for delay in DELAYS[1:]:
        for name, unit in (("seconds", "s"), ("reaction_mean", "s"), ("reaction_worst", "s"), ("reaction_paper", "s")):
            found.append(
                row(f"{name}, vlash, delay {delay}", f"sync, delay {delay}", shape, seeds("vlash", delay, name),
                    seeds("sync", delay, name), unit=unit, note="by the settings, at 30 commands a second")
            )  # fmt: skip
        for mode in SMOOTH:
            found.append(
                row(f"boundary jump, {mode}, delay {delay}", f"naive, delay {delay}", shape,
                    seeds(mode, delay, "boundary_jump"), seeds("naive", delay, "boundary_jump"), unit="distance")
            )  # fmt: skip
    write("vlash_tracking", found)


class FilmedEnvironment(TrackingEnvironment):
    """Keeps where robots and targets were."""

    def reset(self, seed: int) -> Any:
        """Begin anew."""
        seen = super().reset(seed)
        self.path = [torch.stack([self.robot, self.target])]
        return seen

    def step(self, action: torch.Tensor) -> Any:
        """Go on."""
        seen = super().step(action)
        self.path.append(torch.stack([self.robot, self.target]))
        return seen


def film(task: TrackingTask) -> None:
    """The robot that is nearest to the mean of all in all methods, method beside method, in real time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    environment = FilmedEnvironment()
    paths, scores = [], []
    for mode in FILMED:
        rollout(environment, task.method(mode, FILM_DELAY, FILM_SEED, environment), mode, FILM_DELAY, FILM_SEED)
        paths.append(torch.stack(environment.path))
        scores.append(environment.success())
    usual = torch.stack([(score - score.mean()).abs() for score in scores]).sum(0).argmin()

    figure, axes = plt.subplots(1, len(FILMED), figsize=(7.5, 2.9), layout="constrained")
    drawn = []
    for axis, label, score in zip(axes, FILMED.values(), scores, strict=True):
        axis.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"{label}: near {score.mean():.0%} of the time", fontsize=8)
        drawn.append([
            *axis.plot([], [], "-", color="C1", alpha=0.5, lw=1), *axis.plot([], [], "C1o", ms=9, mfc="none"),
            *axis.plot([], [], "-", color="C0", lw=1), *axis.plot([], [], "C0o", ms=5),
        ])  # fmt: skip
    axes[0].plot([], [], "C1o", mfc="none", label="target")
    axes[0].plot([], [], "C0o", label="robot")
    axes[0].legend(loc="lower left", fontsize=6)
    figure.suptitle(f"The policy takes {FILM_DELAY} control steps", fontsize=9)

    def show(number: int) -> list[Any]:
        for path, artists in zip(paths, drawn, strict=True):
            tail = path[max(number - TAIL, 0) : number + 1, :, usual]
            for which, (line, dot) in ((1, artists[:2]), (0, artists[2:])):
                line.set_data(tail[:, which, 0], tail[:, which, 1])
                dot.set_data(tail[-1:, which, 0], tail[-1:, which, 1])
        return [artist for artists in drawn for artist in artists]

    shown = range(50, 50 + FILM_STEPS)  # from where success counts
    FuncAnimation(figure, show, frames=shown).save(FILM, writer=PillowWriter(fps=15), dpi=80)


if __name__ == "__main__":
    main()
