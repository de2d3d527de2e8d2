"""`pronghorn vlash …`: sweep, bench, profile and serve."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from pronghorn.cli.functions import named_function
from pronghorn.files.outputs import check_output
from pronghorn.vlash.lookup import check_checkpoint, is_function, named_pair, renamed
from pronghorn.vlash.serve import serve

app = typer.Typer(no_args_is_help=True)

TASKS = ("tracking",)
BENCH_FORMAT = 2  # of the file that `bench --json` writes
MODES = (  # of the toy; a test compares: it imports torch, and help is to be quick
    "Methods, with commas; of tracking: sync, sync_real_time, naive, rtc, rtc_full, roll_forward, vlash, vlash+delay, "
    "vlash+truth, expert."
)
ROWS = 12  # of the tables of a profile

Policy = Annotated[
    str,
    typer.Argument(
        help="A LeRobot checkpoint, or package.module:function, which takes a device and gives (callable, what it is "
        "called with)."
    ),
]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")]


@app.callback()
def vlash() -> None:
    """VLASH: robots that act while their policy computes, from the state in which they will be."""


@app.command()
def sweep(
    task: Annotated[str, typer.Option(help="tracking, or package.module:function, which gives a Task.")] = "tracking",
    modes: Annotated[str, typer.Option(help=MODES)] = "sync,naive,rtc,vlash",
    delays: Annotated[str, typer.Option(help="Control periods that the policy takes: 0:4, or with commas.")] = "0:4",
    seeds: Annotated[int, typer.Option(help="How many: episodes, and a policy where one is trained.")] = 3,
    out: Annotated[Path | None, typer.Option("--json", help="Rows; what it already holds is not run again.")] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to draw.")] = None,
    train_steps: Annotated[int, typer.Option(help="tracking: updates of each policy.")] = 6000,
    environments: Annotated[
        int | None,
        typer.Option(help="Robots at a time: 512 of tracking; with --env 1, an episode each of a seed."),
    ] = None,
    policies: Annotated[Path | None, typer.Option(help="tracking: folder that keeps trained policies.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="tracking: try a part, print peak memory, time and disk, and stop.")
    ] = False,
    env: Annotated[
        str | None, typer.Option(help="A LeRobot environment in place of a task: pusht, metaworld …; needs --policy.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="env: a LeRobot checkpoint, folder or hub repository.")] = None,
    env_option: Annotated[
        list[str] | None, typer.Option(help="env: name=value of its configuration, such as task=…; may be repeated.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="env: name=value of VLASHSettings, such as n_action_steps=8; may be repeated."),
    ] = None,
    rename_map: Annotated[
        str | None,
        typer.Option(help="env: JSON of names of what is seen, the environment's to the policy's."),
    ] = None,
    device: Device = None,
) -> None:
    """Run a task under growing delays: success, stalls, reaction latency, jumps and jerk of each method."""
    from pronghorn.vlash.sweep import PICTURES, draw, read_rows, write_rows
    from pronghorn.vlash.sweep import sweep as run

    if png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--png needs matplotlib: pip install matplotlib")
    for name, count in (("seeds", seeds), ("train_steps", train_steps), ("environments", environments)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: got {count}, wanted at least 1")
    check_output("json", out)
    check_output("png", png, PICTURES)
    names, waits = modes.split(","), _delays(delays)
    own = {
        "policy": policy, "env_option": env_option, "setting": setting, "rename_map": rename_map, "device": device
    }  # fmt: skip
    if env is None and (stray := [name for name, value in own.items() if value]):
        raise ValueError(f"{stray[0]}: got {own[stray[0]]!r} without env, wanted both, or neither")
    if env is not None and (task not in TASKS or dry_run or policies is not None):
        raise ValueError(f"env: got {env!r} beside task, dry_run or policies, which are for other tasks")
    robots = 512 if environments is None else environments
    if dry_run:
        from pronghorn.vlash.tracking import rehearse

        if task not in TASKS:
            raise ValueError(
                f"dry_run: got task={task!r}, wanted {', '.join(TASKS)}: how long others take is not known"
            )
        typer.echo(rehearse(names, waits, seeds, train_steps=train_steps, environments=robots, folder=policies))
        return
    if env is None:
        asked = _task(task, train_steps, robots, policies)
    else:
        names_of = None if rename_map is None else renamed(rename_map)
        asked = _environment_task(env, policy, environments or 1, device, env_option or [], setting or [], names_of)
        asked.check(names, waits)
    earlier = read_rows(out, asked) if out is not None else []
    rows = []
    with nullcontext() if env is None else closing(asked):
        for row in run(asked, names, waits, range(seeds), earlier):
            rows.append(row)
            if out is not None:
                write_rows(out, asked, [*rows, *(old for old in earlier if old.key not in {new.key for new in rows})])
    _print_tables(rows, names, waits)
    if png is not None:
        draw(rows, png, f"{asked.name}, {seeds} seeds")
    for path in (out, png):
        if path is not None:
            typer.echo(path)


@app.command()
def bench(
    policy: Policy,
    fps: Annotated[float, typer.Option(help="Commands a second.")] = 30.0,
    n_action_steps: Annotated[int, typer.Option(help="Actions of a chunk that are executed.")] = 32,
    samples: Annotated[int, typer.Option(help="Timed chunks.")] = 16,
    warm_up: Annotated[int, typer.Option(help="Chunks before them.")] = 10,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    device: Device = None,
) -> None:
    """Time a policy, and say how far ahead its chunks are to be asked for."""
    from pronghorn.files.json_files import save_json
    from pronghorn.vlash.bench import measure

    check_output("json", out)
    if not 0 < fps < math.inf or n_action_steps < 1:
        raise ValueError(f"fps, n_action_steps: got {fps} and {n_action_steps}, wanted positive numbers")
    call, _ = _load(policy, device)
    found = measure(call, samples=samples, warm_up=warm_up)
    quantiles = {percent: found.percentile(percent) for percent in (5, 50, 95, 100)}
    typer.echo(f"{found.mean * 1e3:.2f} ms a chunk, mean of {samples}")
    typer.echo(", ".join(f"p{percent} {seconds * 1e3:.2f}" for percent, seconds in quantiles.items()))
    overlap = found.overlap(fps, n_action_steps)
    chunk = f"n_action_steps {n_action_steps} at {fps:g} fps, {n_action_steps / fps * 1e3:.0f} ms"
    typer.echo(f"{chunk}: " + (f"inference_overlap_steps {overlap}" if overlap else "too short, the robot would wait"))
    if out is not None:
        figures = {"seconds": found.seconds, "mean": found.mean, "fps": fps, "n_action_steps": n_action_steps}
        save_json(out, {**figures, "inference_overlap_steps": overlap}, format=BENCH_FORMAT)


@app.command()
def profile(
    policy: Policy,
    depth: Annotated[int, typer.Option(help="Levels of modules below the policy.")] = 2,
    samples: Annotated[int, typer.Option(help="Recorded chunks.")] = 3,
    device: Device = None,
) -> None:
    """Where the time of a chunk goes: modules, with all that is inside of them, and operators."""
    from rich.console import Console
    from rich.table import Table

    from pronghorn.vlash.bench import profile as run

    call, module = _load(policy, device)
    found = run(call, module, depth=depth, samples=samples)
    typer.echo(f"{found.seconds * 1e3:.2f} ms a chunk while recorded")
    for title, parts in (("module", found.modules), ("operator", found.operators)):
        if not parts:
            continue
        table = Table(title, "calls", "ms a chunk", "share")
        for part in parts[:ROWS]:
            share = part.seconds / found.seconds
            table.add_row(part.name, f"{part.calls:g}", f"{part.seconds * 1e3:.3f}", f"{share:.1%}")
        if len(parts) > ROWS:
            table.caption = f"the first {ROWS} of {len(parts)}"
        Console().print(table)


app.command()(serve)


def _task(name: str, train_steps: int, environments: int, policies: Path | None) -> Any:
    if ":" in name:
        return named_function("task", name)()
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, accepted are {', '.join(TASKS)} and package.module:function")
    from pronghorn.vlash.tracking import TrackingTask

    return TrackingTask(train_steps=train_steps, environments=environments, folder=policies)


def _print_tables(rows: list[Any], modes: list[str], delays: list[int]) -> None:
    """Success, and the largest reward where there are some."""
    from rich.console import Console
    from rich.table import Table

    from pronghorn.vlash.sweep import over_delays

    for title, column in (("success", "success"), ("largest reward", "reward_largest")):
        if any(getattr(row, column) is None for row in rows):
            continue
        table = Table(f"{title} at delay", *map(str, delays))
        for mode in modes:
            over = over_delays(rows, mode, column)
            table.add_row(mode, *(_spread(over[delay]) for delay in delays))
        Console().print(table)


def _environment_task(
    env: str,
    policy: str | None,
    episodes: int,
    device: str | None,
    options: list[str],
    settings: list[str],
    rename_map: dict[str, str] | None,
) -> Any:
    if policy is None:
        raise ValueError(f"policy: got none with env={env!r}, wanted a LeRobot checkpoint")
    import torch

    from pronghorn.vlash.lerobot.environment_task import EnvironmentTask

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return EnvironmentTask(
        env, policy, episodes=episodes, device=where, options=_named("env_option", options),
        settings=_named("setting", settings), rename_map=rename_map,
    )  # fmt: skip


def _named(option: str, pairs: list[str]) -> dict[str, Any]:
    """Of ["name=value", …]; values are JSON, or else text."""
    found = {}
    for pair in pairs:
        name, is_there, text = pair.partition("=")
        if not (name and is_there):
            raise ValueError(f"{option}: got {pair!r}, wanted name=value")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _load(policy: str, device: str | None) -> tuple[Callable[[], Any], Any]:
    """What computes one chunk of an example, and the module in it, if there is one."""
    import torch
    from torch import nn

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_function(policy):
        call, example = named_pair("policy", policy, where, "(callable, what it is called with)")
    else:
        check_checkpoint("policy", policy)
        from pronghorn.vlash.lerobot.example import policy_with_example

        call, example = policy_with_example(policy, where)
    owner = getattr(call, "__self__", call)
    return lambda: call(example), owner if isinstance(owner, nn.Module) else None


def _delays(text: str) -> list[int]:
    """Of "0:4", both included, or "0,2,4"."""
    try:
        if ":" in text:
            first, last = map(int, text.split(":"))
            found = list(range(first, last + 1))
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"wanted 0:4 or numbers with commas, got {text!r}") from None
    if not found or min(found) < 0:
        raise typer.BadParameter(f"wanted 0:4 or numbers with commas, got {text!r}")
    return found


def _spread(values: list[float]) -> str:
    middle = f"{statistics.fmean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ±{(max(values) - min(values)) / 2:.3f}"
