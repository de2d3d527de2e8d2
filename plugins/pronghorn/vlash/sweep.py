"""The same task under growing delays, by several methods: how well, how fast, how smoothly."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pronghorn.files.atomic import write_atomically
from pronghorn.files.json_files import load_json, save_json
from pronghorn.vlash.chunks import Observation, Policy
from pronghorn.vlash.config import SYNC, VLASHSettings
from pronghorn.vlash.estimators import StateEstimator
from pronghorn.vlash.metrics import boundary_jump, jerk, paper_reaction_latency, typical_step
from pronghorn.vlash.quantization import hold, is_delta
from pronghorn.vlash.runner import AsyncRunner


class Environment(Protocol):
    """Several episodes in lock step, in simulated time.

    Attributes:
        horizon: control periods of an episode at most.
        finished: bool [count], whose episode is over; such a one takes further commands and ignores them.
    """

    horizon: int
    finished: Tensor

    def reset(self, seed: int) -> Observation:
        """Begin; the same seed gives the same episodes, whatever is done in them."""
        ...

    def step(self, action: Tensor) -> Observation:
        """Execute a command, [count, action_dim], for a control period."""
        ...

    def success(self) -> Tensor:
        """[count], from 0 to 1, of the episodes so far."""
        ...


@runtime_checkable
class Rewarding(Protocol):
    """What an `Environment` that pays rewards has too."""

    def rewards(self) -> tuple[Tensor, Tensor]:
        """[count] each, of the episodes so far: the largest reward, and the sum."""
        ...


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        settings: how chunks follow each other.
        policy: gives them.
        estimator: of the state; by default the one that `settings` names.
        world_waits: whether the world stands still, as simulators do, while the robot waits for a chunk. Otherwise it
            goes on, and the robot holds, save before the first command.
    """

    settings: VLASHSettings
    policy: Policy
    estimator: StateEstimator | None = None
    world_waits: bool = True


class Task(Protocol):
    """What can be swept."""

    @property
    def name(self) -> str:
        """For titles and files."""
        ...

    @property
    def modes(self) -> Sequence[str]:
        """Names of methods."""
        ...

    def about(self) -> dict[str, Any]:
        """What else the results depend on, for JSON."""
        ...

    def environment(self) -> Any:
        """An `Environment`."""
        ...

    def method(self, mode: str, delay: int, seed: int, environment: Any) -> Method:
        """A method of `modes` for a policy that takes `delay` control periods.

        Args:
            mode: its name.
            delay: control periods from an observation until its chunk is used.
            seed: of the policy, and of its training where there is one.
            environment: of `environment()`, for estimators that look into it.

        Raises:
            ValueError: the mode is unknown, or cannot bear the delay.
        """
        ...


@dataclass(frozen=True)
class SweepRow:
    """What one method did under one delay, means over the episodes.

    Attributes:
        mode: the method.
        delay: control periods that the policy takes.
        seed: of episodes and policy.
        episodes: how many.
        n_action_steps: actions of a chunk that are executed.
        success: from 0 to 1.
        steps: commands of an episode.
        stalls: chunks that the robot stood still for, the first one included.
        stall_seconds: how long, in simulated time, where the policy takes `delay` control periods.
        seconds: an episode's, standing still included.
        reaction_mean: expected seconds from an event, at a random time, to the first command that knows of it.
        reaction_worst: the same for an event just after an observation.
        reaction_paper: the same as the paper counts it, which differs: see `metrics.paper_reaction_latency`.
        boundary_jump: distance from the last command of a chunk to the first of the next, in the commands' unit.
        typical_step: the same for other commands that follow each other.
        jerk: of the goals, per second³; changes are summed up to goals.
        reward_largest: of an episode; None where there are no rewards.
        reward_sum: likewise.
    """

    mode: str
    delay: int
    seed: int
    episodes: int
    n_action_steps: int
    success: float
    steps: float
    stalls: float
    stall_seconds: float
    seconds: float
    reaction_mean: float
    reaction_worst: float
    reaction_paper: float
    boundary_jump: float | None
    typical_step: float | None
    jerk: float | None
    reward_largest: float | None = None
    reward_sum: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """What makes it another row."""
        return self.mode, self.delay, self.seed

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without rewards where there are none."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in REWARDS}


def sweep(
    task: Task, modes: Sequence[str], delays: Sequence[int], seeds: Sequence[int], done: Iterable[SweepRow] = ()
) -> Iterator[SweepRow]:
    """Every mode under every delay with every seed; shows a bar.

    Args:
        task: what is done.
        modes: of `task.modes`.
        delays: control periods that the policy takes.
        seeds: of episodes and policies; a seed's episodes are the same for all methods.
        done: rows of an earlier sweep, which are given as they are.

    Raises:
        ValueError: there is nothing to do, or a mode or delay is not one of the task's.
    """
    from tqdm import tqdm

    for name, values in (("modes", modes), ("delays", delays), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name}: got none, wanted at least one")
    unknown = [mode for mode in modes if mode not in task.modes]
    if unknown:
        raise ValueError(f"modes: got {', '.join(unknown)}, accepted for {task.name} are {', '.join(task.modes)}")
    known = {row.key: row for row in done}
    environment = task.environment()
    cases = [(mode, delay, seed) for mode in modes for delay in delays for seed in seeds]
    for mode, delay, seed in tqdm(cases, desc=task.name, leave=False):
        row = known.get((mode, delay, seed))
        yield row or rollout(environment, task.method(mode, delay, seed, environment), mode, delay, seed)


def rollout(environment: Environment, method: Method, mode: str, delay: int, seed: int) -> SweepRow:
    """Run one method from an episode's begin to its end."""
    settings = method.settings
    observation, periods = environment.reset(seed), 0
    steps = torch.zeros(len(environment.finished))
    actions: list[Tensor] = []
    chunks: list[int] = []
    waits: list[int] = []
    with AsyncRunner(method.policy, settings, method.estimator, threaded=False) as runner:
        counts = runner.manager.counts
        while periods < environment.horizon and not environment.finished.all():
            stalls = counts.stalls
            tick = runner.tick(lambda seen=observation: seen)  # type: ignore[misc]
            if counts.stalls > stalls:
                waits.append(len(actions))
                held = 0 if method.world_waits or not actions else min(delay, environment.horizon - periods)
                for _ in range(held):
                    environment.step(hold(actions[-1], settings))
                periods += held
                if periods == environment.horizon:
                    break
            steps += ~environment.finished.cpu()
            actions.append(tick.action)
            chunks.append(tick.chunk)
            observation = environment.step(tick.action)
            periods += 1

    begins = [step for step in range(1, len(chunks)) if chunks[step] != chunks[step - 1]]
    latency = delay / settings.fps
    cycle = settings.n_action_steps / (settings.action_quant_ratio * settings.fps)
    if settings.async_mode == SYNC:
        cycle += latency
    rewards = [float(part.mean()) for part in environment.rewards()] if isinstance(environment, Rewarding) else []
    stalls_mean = float(torch.stack([steps > wait for wait in waits]).float().sum(0).mean())
    return SweepRow(
        mode, delay, seed, len(steps), settings.n_action_steps, float(environment.success().mean()),
        float(steps.mean()), stalls_mean, stalls_mean * latency,
        seconds=float(steps.mean()) / settings.fps + stalls_mean * latency,
        reaction_mean=latency + cycle / 2, reaction_worst=latency + cycle,
        reaction_paper=paper_reaction_latency(settings, latency),
        **_smoothness(torch.stack(actions), begins, steps.long(), settings),
        **dict(zip(("reward_largest", "reward_sum"), rewards, strict=False)),
    )  # fmt: skip


def _smoothness(actions: Tensor, begins: list[int], steps: Tensor, settings: VLASHSettings) -> dict[str, float | None]:
    """Weighted over groups of episodes that are as long, since what comes after their end is of no meaning."""
    deltas = torch.tensor(is_delta(settings, actions.shape[-1]), device=actions.device)
    goals = torch.where(deltas, actions.cumsum(0), actions)
    found: dict[str, list[tuple[float, int]]] = {"boundary_jump": [], "typical_step": [], "jerk": []}
    for length in steps.unique().tolist():
        group = (steps == length).nonzero()[:, 0].to(actions.device)
        inside = [begin for begin in begins if begin < length]
        for name, value in (
            ("boundary_jump", boundary_jump(actions[:length, group], inside)),
            ("typical_step", typical_step(actions[:length, group], inside)),
            ("jerk", jerk(goals[:length, group], settings.fps)),
        ):
            if value is not None:
                found[name].append((value, len(group)))
    return {
        name: sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts) if parts else None
        for name, parts in found.items()
    }


def write_rows(path: Path, task: Task, rows: Sequence[SweepRow]) -> None:
    """JSON, all at once: {"task", "about", "rows"}."""
    content = {"task": task.name, "about": task.about(), "rows": [row.to_dict() for row in rows]}
    save_json(path, content, format=FORMAT)


def read_rows(path: Path, task: Task) -> list[SweepRow]:
    """The rows that `write_rows` wrote; none if there is no such file.

    Raises:
        ValueError: the file holds something else, or a sweep of another task.
    """
    if not path.exists():
        return []
    try:
        content = load_json(path, newest=FORMAT)
        rows = [SweepRow(**row) for row in content["rows"]]
        of = content["task"], content["about"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted what a sweep wrote, {error!r}") from error
    if of != (task.name, json.loads(json.dumps(task.about()))):
        raise ValueError(f"{path}: holds a sweep of {of[0]} with {of[1]}, wanted {task.name} with {task.about()}")
    return rows


FORMAT = 2  # of the file of rows
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")
PANELS = {
    "success": "success", "seconds": "seconds an episode", "stall_seconds": "seconds standing still",
    "reaction_worst": "reaction latency, s", "boundary_jump": "jump between chunks", "jerk": "jerk, 1/s³",
}  # fmt: skip
REWARDS = {"reward_largest": "largest reward of an episode", "reward_sum": "its sum of rewards"}


def draw(rows: Sequence[SweepRow], path: Path, title: str) -> None:
    """A picture: each of `PANELS`, and of `REWARDS` if there are some, over the delay.

    A line is a method, through means, with ranges over seeds.

    Args:
        rows: of a sweep.
        path: of the file, of the kind that its ending says, one of `PICTURES`.
        title: above it.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = PANELS | (REWARDS if any(row.reward_largest is not None for row in rows) else {})
    columns = len(panels) // 2
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 6), sharex=True, layout="constrained")
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        for number, mode in enumerate(dict.fromkeys(row.mode for row in rows)):
            over = over_delays(rows, mode, name)
            places = list(over)
            axis.plot(places, [statistics.fmean(values) for values in over.values()], f"C{number}o-", ms=3, label=mode)
            low, high = [min(values) for values in over.values()], [max(values) for values in over.values()]
            axis.fill_between(places, low, high, color=f"C{number}", alpha=0.15)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("delay, control periods")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=10, frameon=False)
    figure.suptitle(title)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format=path.suffix[1:].lower())
    plt.close(figure)
    write_atomically(path, drawn.getvalue())


def over_delays(rows: Sequence[SweepRow], mode: str, name: str) -> dict[int, list[float]]:
    """For each delay, ascending, a column's values over seeds, those that there are."""
    found: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: row.delay):
        value = getattr(row, name)
        if row.mode == mode and value is not None:
            found.setdefault(row.delay, []).append(value)
    return found
