"""`pronghorn bench`: what can be measured here, one table and one results file."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pronghorn.cli.new import is_clone
from pronghorn.cli.verify import failure, limits
from pronghorn.files.atomic import write_atomically
from pronghorn.files.outputs import check_output
from pronghorn.kernels._operation import Operation, operations
from pronghorn.measurement import device, measure, results, row
from pronghorn.methods import entry_points, is_disabled

BACKEND = "PRONGHORN_KERNELS"
SCRIPTS = "benchmarks"
NEEDS = "NEEDS"  # a tuple in a script: what it needs of the machine, "cuda", or "cuda:2" for two GPUs
COMMAND = "bench"  # what methods call theirs


def bench(names: Sequence[str], *, seconds: float, out: Path, as_json: bool = False, dry_run: bool = False) -> bool:
    """Measure operations, and in a clone run the scripts of its folder; whether none failed.

    One that fails is listed with its reason, and the others go on; what was measured is written also if they cannot.

    Args:
        names: of operations and scripts; none are all.
        seconds: most that a script may take.
        out: file for the results, in the format of benchmarks/results; what was not run stands under "not_run".
        as_json: print what the file holds instead of a table.
        dry_run: only say what there is, and how long each may take.

    Raises:
        ValueError: a name is unknown, or `out` cannot be written, which is said before anything runs.
    """
    check_output("out", out)
    kernels = {operation.name: operation for operation in operations()}
    scripts = _scripts(Path.cwd())
    unknown = [name for name in names if name not in kernels and name not in scripts]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: no benchmark; there are {', '.join([*kernels, *scripts])}")
    chosen = [name for name in dict.fromkeys((*kernels, *scripts)) if not names or name in names]
    failed: list[str] = []
    not_run: dict[str, str] = {}

    def tried(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except _EndedError as error:
            not_run[name] = str(error)
            failed.extend([name] * error.fault)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken benchmark must not take the others along
            not_run[name] = failure(error)
            failed.append(name)
        return None

    for name in chosen:
        if name in scripts and (obstacle := tried(name, _obstacle, scripts[name])):
            not_run[name] = obstacle
    if not names:
        not_run |= {name: f"needs a model: {command}" for name, command in _commands()}
    console = Console()
    if dry_run:
        for name in chosen:
            limit = f"at most {seconds:g} s, see --seconds" if name in scripts else "a few timed calls, without a limit"
            console.print(f"{name}: {not_run.get(name, f'can run here, {limit}')}", markup=False, soft_wrap=True)
        _say(console, {name: reason for name, reason in not_run.items() if name not in chosen})
        return True
    rows: list[dict[str, Any]] = []
    try:
        machine = limits(device()) if any(name in kernels for name in chosen) else ()
        for name in (bar := tqdm(chosen, desc="benchmarks")):
            bar.set_postfix_str(name)
            if name in kernels:
                rows += tried(name, _measured, kernels[name], *machine) or []
            if name in scripts and name not in not_run:
                rows += tried(name, _run, scripts[name], seconds) or []
    finally:
        # Shown before it is written, which may fail.
        text = json.dumps({**results("bench", rows), "not_run": not_run}, indent=1) + "\n"
        if as_json:
            sys.stdout.write(text)
        else:
            console.print(_table(rows))
            _say(console, not_run)
        write_atomically(out, text.encode())
    if not as_json:
        console.print(f"{len(rows)} rows -> {out}", markup=False, soft_wrap=True)
    return not failed


def _measured(operation: Operation, bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """On a GPU against the reference there; elsewhere the reference is what runs, so against the hardware's limit."""
    where = device()
    on_gpu = where.type == "cuda"
    knobs = operation.large if on_gpu else operation.shapes[0]
    dtype = torch.float16 if on_gpu else torch.float32
    arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), where)
    call = functools.partial(operation.timed, **arguments)
    cost = operation.cost(knobs)
    floor = max(cost.bytes / bandwidth, cost.flops / rate)
    ours = _timed(call, "triton") if on_gpu else measure(call)
    peer, theirs = "its reference", _timed(call, "reference") if on_gpu else {}
    if not on_gpu:
        peer, theirs = "this machine's limit", dict.fromkeys(ours, floor)
    shape = " ".join(f"{key}={value}" for key, value in knobs.items())
    return [row(operation.name, peer, shape, ours, theirs, roofline=floor / ours["p50"])]


def _timed(call: functools.partial[Any], backend: str) -> dict[str, float]:
    before = os.environ.get(BACKEND)
    os.environ[BACKEND] = backend
    try:
        return measure(call, repeats=20, graphed=backend != "reference")  # a reference may wait for the GPU
    finally:
        os.environ.pop(BACKEND)
        if before is not None:
            os.environ[BACKEND] = before


def _scripts(folder: Path) -> dict[str, Path]:
    """The benchmarks of a clone: the scripts of its folder that have a `main`, and write results."""
    if not is_clone(folder):
        return {}
    found = {path.stem: path for path in sorted((folder / SCRIPTS).glob("*.py"))}
    texts = {name: path.read_text() for name, path in found.items()}
    return {
        name: path
        for name, path in found.items()
        if "def main()" in texts[name] and "from harness import" in texts[name]
    }


def _obstacle(script: Path) -> str:
    """What a script needs and is not here: libraries that it imports, and what its `NEEDS` says."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == NEEDS:
            for need in ast.literal_eval(node.value):
                kind, _, count = need.partition(":")
                if kind != "cuda":
                    raise ValueError(f"{script}: {NEEDS} has {need!r}, wanted 'cuda' or 'cuda:2'")
                if torch.cuda.device_count() < int(count or 1):
                    return f"needs {'a GPU' if not count else f'{count} GPUs'}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        for name in names:
            library = name.partition(".")[0]
            beside = script.parent / f"{library}.py"
            if beside.exists() and (reason := _obstacle(beside)):
                return reason
            if not beside.exists() and importlib.util.find_spec(library) is None:
                return f"needs {library}"
    return ""


class _EndedError(Exception):
    """A script gave no rows: why, and whether that is its fault."""

    def __init__(self, reason: str, *, fault: bool) -> None:
        super().__init__(reason)
        self.fault = fault


def _run(script: Path, seconds: float) -> list[dict[str, Any]]:
    """A script's rows.

    Raises:
        _EndedError: there are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OUT": folder}
        command = [sys.executable, str(script)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)  # noqa: S603 - the clone's own file
        except subprocess.TimeoutExpired:
            raise _EndedError(f"took more than {seconds:g} s, see --seconds", fault=False) from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise _EndedError(f"failed: {lines[-1] if lines else f'exit {done.returncode}'}", fault=True)
        files = sorted(Path(folder).glob("*.json"))
        topics = [json.loads(path.read_text()) for path in files]
        return [{**row, "what": f"{topic['topic']}: {row['what']}"} for topic in topics for row in topic["rows"]]


def _commands() -> Iterator[tuple[str, str]]:
    """Benchmarks that methods have as commands, for a model of the user's."""
    for entry in entry_points("cli"):
        if is_disabled(entry.name):
            continue
        try:
            own = {command.name or command.callback.__name__ for command in _all_commands(entry.load())}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken method must not take the others along
            yield entry.name, f"not available: {type(error).__name__}: {error}"
            continue
        if COMMAND in own:
            yield f"{entry.name} {COMMAND}", f"pronghorn {entry.name} {COMMAND} --help"


def _all_commands(app: Any) -> Iterator[Any]:
    yield from app.registered_commands
    for group in app.registered_groups:
        yield from _all_commands(group.typer_instance)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("what", "shape", "ours", "peer", "against", "ratio", "of the limit", "unit")
    for entry in rows:
        ratio, share = entry["ratio"], entry["roofline"]
        table.add_row(
            entry["what"], entry["shape"], f"{entry['ours']['p50']:.3g}", f"{entry['theirs']['p50']:.3g}",
            entry["against"], "" if ratio is None else f"{ratio:.2f}x", "" if share is None else f"{share:.0%}",
            entry["unit"],
        )  # fmt: skip
    return table


def _say(console: Console, not_run: dict[str, str]) -> None:
    for name, reason in not_run.items():
        console.print(f"not run: {name}: {reason}", markup=False, soft_wrap=True)
