"""What a run leaves for its diagnosis: a line of JSON for each step, and one for each of its trajectories."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

STEPS_FILE, TRAJECTORIES_FILE = "vcpo_steps.jsonl", "vcpo_stats.jsonl"
BEGINNING = b'{"step": '
CHECKSUM = "crc32"  # of the line before it
NAME, WHOLE, REAL = "a name", "a whole number", "a number"
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # JSON has no such numbers; these words are what Python's float() reads

STEP_KEYS = {
    "step": WHOLE, "ess": REAL, "ess_ratio": REAL, "ess_clipped": REAL, "ess_ratio_clipped": REAL,
    "ess_reference": REAL, "learning_rate": REAL, "learning_rate_scale": REAL, "grad_norm": REAL, "reward": REAL,
    "staleness_mean": REAL, "staleness_max": WHOLE, "trajectories": WHOLE,
}  # fmt: skip
TRAJECTORY_KEYS = {
    "step": WHOLE, "uid": NAME, "group": NAME, "param_version_start": WHOLE, "param_version_end": WHOLE,
    "trainer_version": WHOLE, "prompt_length": WHOLE, "response_length": WHOLE, "reward": REAL, "advantage": REAL,
    "grad_norm": REAL, "grad_norm_unscaled": REAL, "k3_kl": REAL, "geometric_mean_ratio": REAL, "ratio": REAL,
    "clipped_ratio": REAL, "log_ratio": REAL,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The records of a run, whole steps only, by columns.

    Attributes:
        folder: where they lie.
        steps: by the names of `STEP_KEYS`, each [steps], in order.
        trajectories: by the names of `TRAJECTORY_KEYS`, each [trajectories], those of a step side by side. Names are
            objects, numbers int64 or float64; NaN stands where a number was not measured.
    """

    folder: Path
    steps: dict[str, NDArray[Any]]
    trajectories: dict[str, NDArray[Any]]

    @property
    def staleness(self) -> NDArray[Any]:
        """How many updates old the weights were that began each trajectory, when it was learned from."""
        found: NDArray[Any] = self.trajectories["trainer_version"] - self.trajectories["param_version_start"]
        return found


class RunRecords:
    """Appends steps to the records of a run; one process of a run has one.

    A step counts once its line is there and all its trajectories: what a crash left of another is cut off here.

    Args:
        folder: of the run; made where there is none. A run that goes on calls `truncate` with the step that it goes
            on from, one that starts anew with -1.

    Raises:
        FileNotFoundError: there are trajectories, but the file of their steps is gone.
        ValueError, TypeError: the folder's records are damaged elsewhere than at their end.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._steps, self._trajectories = self.folder / STEPS_FILE, self.folder / TRAJECTORIES_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._steps.exists() and self._trajectories.exists() and self._trajectories.stat().st_size:
            raise FileNotFoundError(f"{self._steps} is gone, {self._trajectories} is there; bring it back or move both")
        self._steps.touch()
        self._trajectories.touch()
        self._last = -1
        self._cut(None)

    @property
    def last_step(self) -> int | None:
        """The last step that is recorded."""
        return None if self._last < 0 else self._last

    def append(self, step_row: Mapping[str, Any], trajectory_rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a step: on disk when this returns; where it raises, the records are as they were.

        Args:
            step_row: a value for each of `STEP_KEYS`.
            trajectory_rows: for each of its trajectories, a value for each of `TRAJECTORY_KEYS`. Numbers may be
                NumPy's, infinite or NaN; None stands for one that was not measured, and is read as NaN.

        Raises:
            ValueError, TypeError: keys or values are others, the step is not after the last one, or the rows are not
                as many as it says.
            OSError: no room or no permission.
        """
        step = _checked(step_row, STEP_KEYS, "step_row")
        places = [f"trajectory_rows[{number}]" for number in range(len(trajectory_rows))]
        rows = [_trajectory(row, place) for row, place in zip(trajectory_rows, places, strict=True)]
        if step["step"] <= self._last:
            raise ValueError(
                f"step_row: got step {step['step']}, but {self._steps} goes to {self._last}; a run that goes on from "
                "an earlier step calls truncate first"
            )
        if step["trajectories"] != len(rows):
            raise ValueError(f"step_row: says {step['trajectories']} trajectories, trajectory_rows has {len(rows)}")
        for row, place in zip(rows, places, strict=True):
            if row["step"] != step["step"]:
                raise ValueError(f"{place}: got step {row['step']}, wanted step_row's {step['step']}")
        sizes = {path: path.stat().st_size for path in (self._trajectories, self._steps)}
        try:
            # The step's line comes last: it says that all the others are there.
            for path, lines in ((self._trajectories, rows), (self._steps, [step])):
                _append(path, lines)
        except BaseException:
            for path, size in sizes.items():
                os.truncate(path, size)
            raise
        self._last = step["step"]

    def truncate(self, after_step: int) -> None:
        """Drop steps after `after_step`, from whose checkpoint a run goes on; -1 drops all."""
        if type(after_step) is not int or after_step < -1:
            raise ValueError(f"after_step: got {after_step!r}, wanted a whole number of at least -1")
        self._cut(after_step)

    def _cut(self, after_step: int | None) -> None:
        steps, trajectories = _tables(self.folder)
        if after_step is not None:
            steps, trajectories = steps.until(after_step), trajectories.until(after_step)
        # Steps first: trajectories without a step's line are cut off when the folder is opened again.
        for path, table in ((self._steps, steps), (self._trajectories, trajectories)):
            if path.stat().st_size > table.end:
                os.truncate(path, table.end)
        self._last = steps.columns["step"][-1] if len(steps) else -1


def read_run(folder: Path | str) -> Run:
    """The records of a run, also while it goes on.

    A step that is not whole at the end of the files, as after a crash, is left out with a warning.

    Raises:
        FileNotFoundError: the folder has no records.
        ValueError, TypeError: a line is damaged elsewhere; the error names file and line.
    """
    folder = Path(folder)
    missing = [name for name in (STEPS_FILE, TRAJECTORIES_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no {' and no '.join(missing)}; wanted the folder of a run that kept records"
        )
    steps, trajectories = _tables(folder)
    return Run(folder, steps.arrays(), trajectories.arrays())


@dataclass(frozen=True)
class _Table:
    """Columns of a file, and where its lines end in it."""

    kinds: Mapping[str, str]
    columns: dict[str, Any]
    ends: Any

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def end(self) -> int:
        return self.ends[-1] if len(self) else 0

    def first(self, count: int) -> _Table:
        return _Table(self.kinds, {name: column[:count] for name, column in self.columns.items()}, self.ends[:count])

    def until(self, step: int) -> _Table:
        return self.first(int(np.searchsorted(self.steps(), step, side="right")))

    def steps(self) -> NDArray[Any]:
        return np.array(self.columns["step"], np.int64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        types: dict[str, Any] = {NAME: object, WHOLE: np.int64, REAL: np.float64}
        return {name: np.array(self.columns[name], types[kind]) for name, kind in self.kinds.items()}


def _tables(folder: Path) -> tuple[_Table, _Table]:
    """Steps and trajectories, up to the last step that is whole in both.

    Raises:
        ValueError: another step is not.
    """
    steps = _read(folder / STEPS_FILE, STEP_KEYS)  # first: a run that goes on writes its trajectories first
    trajectories = _read(folder / TRAJECTORIES_FILE, TRAJECTORY_KEYS)
    named, owners = steps.steps(), trajectories.steps()
    last = named[-1] if len(named) else -1
    begun = np.unique(owners[owners > last])
    if len(begun) > 1:
        raise ValueError(
            f"{folder / STEPS_FILE}: ends with step {last}, {TRAJECTORIES_FILE} goes on to step {begun[-1]}; a crash "
            "leaves one step without its line, not more"
        )
    unknown = np.setdiff1d(owners[owners <= last], named)
    if len(unknown):
        raise ValueError(f"{folder / TRAJECTORIES_FILE}: step {unknown[0]} has no line in {STEPS_FILE}")
    found = np.searchsorted(owners, named, side="right") - np.searchsorted(owners, named, side="left")
    broken = np.flatnonzero(found != np.array(steps.columns["trajectories"], np.int64))
    if len(broken) and broken[0] < len(named) - 1:
        place = int(broken[0])
        raise ValueError(
            f"{folder / TRAJECTORIES_FILE}: step {named[place]} has {found[place]} trajectories, its line in "
            f"{STEPS_FILE} says {steps.columns['trajectories'][place]}"
        )
    whole = steps.first(len(steps) - len(broken))
    kept = trajectories.until(whole.columns["step"][-1] if len(whole) else -1)
    if len(whole) < len(steps) or len(kept) < len(trajectories):
        _log.warning(
            "%s: what follows step %s is not whole, as after a crash: %d trajectories of it are left out",
            folder, whole.columns["step"][-1] if len(whole) else "-", len(trajectories) - len(kept),
        )  # fmt: skip
    return whole, kept


def _read(path: Path, kinds: Mapping[str, str]) -> _Table:
    columns: dict[str, Any] = {
        name: [] if kind == NAME else array("q" if kind == WHOLE else "d") for name, kind in kinds.items()
    }
    ends, previous = array("q"), -1
    for place, end, row in _lines(path):
        values = _trajectory(row, place) if kinds is TRAJECTORY_KEYS else _checked(row, kinds, place)
        if values["step"] < previous or (kinds is STEP_KEYS and values["step"] == previous):
            raise ValueError(f"{place}: got step {values['step']} after step {previous}, wanted them in order")
        previous = values["step"]
        for name, value in values.items():
            columns[name].append(value)
        ends.append(end)
    return _Table(kinds, columns, ends)


def _lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, end and content of each line; a torn last one is left out with a warning."""
    with path.open("rb") as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        for number, line in enumerate(file, 1):
            end += len(line)
            place = f"{path}, line {number}"
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                # An append that was cut off leaves the beginning of a line, and nothing else.
                if end < size or line.endswith(b"\n") or not line.startswith(BEGINNING[: len(line)]):
                    raise ValueError(f"{place}: got {line[:40]!r}, wanted an object of JSON")
                _log.warning("%s is torn, as by a crash, and left out", place)
                return
            if not _is_whole(line, row):
                raise ValueError(f"{place}: damaged: it does not say what was written")
            yield place, end, row


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    content = "".join(_with_checksum(encoded(row)) + "\n" for row in rows).encode()
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _with_checksum(line: str) -> str:
    """A line with a CRC-32 of what it says as its last key: a digit that has changed is no other number."""
    return f'{line[:-1]}, "{CHECKSUM}": {zlib.crc32(line.encode())}}}'


def _is_whole(line: bytes, row: dict[str, Any]) -> bool:
    """Whether a line says what was written; older ones have no checksum, and are believed."""
    if CHECKSUM not in row:
        return True
    said = row.pop(CHECKSUM)
    content = line.rstrip(b"\n").removesuffix(f', "{CHECKSUM}": {said}}}'.encode()) + b"}"
    return bool(type(said) is int and zlib.crc32(content) == said)


def encoded(values: Any) -> str:
    """JSON that every reader takes: numbers that are not finite are words."""
    return json.dumps(_words(values), allow_nan=False)


def _words(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _words(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_words(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _trajectory(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    values = _checked(row, TRAJECTORY_KEYS, place)
    start, now = values["param_version_start"], values["trainer_version"]
    if start > now:
        raise ValueError(f"{place}: got param_version_start {start}, which is after its trainer_version {now}")
    return values


def _checked(row: Mapping[str, Any], kinds: Mapping[str, str], place: str) -> dict[str, Any]:
    if row.keys() != kinds.keys():
        wrong = [f"no {name}" for name in kinds if name not in row]
        wrong += [f"{name}, which is none of its keys" for name in row if name not in kinds]
        raise ValueError(f"{place}: got {'; '.join(wrong)}")
    return {name: _value(row[name], kind, place, name) for name, kind in kinds.items()}


def _value(value: Any, kind: str, place: str, name: str) -> Any:
    if kind == REAL:
        if value is None:
            return math.nan
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if number or (isinstance(value, str) and value in NOT_FINITE):
            return float(value)
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if kind == WHOLE and value < 0:
            raise ValueError(f"{place}: {name}: got {value}, wanted a whole number of at least 0")
        return int(value)
    elif kind == NAME and isinstance(value, str):
        return value
    raise TypeError(f"{place}: {name}: got {value!r}, wanted {kind}")
