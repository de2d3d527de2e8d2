"""What a command will take, said by its `--dry-run` after a short piece of the real work.

On a GPU the first call of most work compiles kernels. They are kept on disk, where the run finds them: that time is no
part of what it takes. Nor are the seconds in which a process loads them, so that a short run takes longer than is said.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch


@dataclass(frozen=True)
class Estimate:
    """What all of a run takes.

    Attributes:
        memory_bytes: its peak: of the whole process on a CPU, which moves with what malloc keeps of freed memory;
            allocated by torch on a GPU.
        disk_bytes: the most that it has written at a time.
        seconds: of the run, on this machine as it is now.
        basis: the piece of the work that was done to know it.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float
    basis: str

    def __str__(self) -> str:
        time = f"{self.seconds:.3g} seconds" if self.seconds < 120 else f"{self.seconds / 60:.3g} minutes"
        return (
            f"peak memory {_size(self.memory_bytes)}, disk {_size(self.disk_bytes)}, about {time} "
            f"(measured: {self.basis})"
        )


def in_turn(parts: Sequence[Estimate]) -> Estimate:
    """Of parts of a run that follow each other, estimated in this order: each peak is the highest up to there."""
    return Estimate(
        parts[-1].memory_bytes, sum(part.disk_bytes for part in parts), sum(part.seconds for part in parts),
        ", ".join(part.basis for part in parts),
    )  # fmt: skip


@dataclass
class StepClock:
    """Takes the time between steps; call it after each.

    Attributes:
        device: where the steps run.
        started: when the first step began, in seconds of `time.perf_counter`.
        ended: when each ended.
    """

    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    ended: list[float] = field(default_factory=list)

    def __call__(self, *_: object) -> None:
        """A step has ended."""
        self.ended.append(now(self.device))

    def taken(self) -> list[float]:
        """Seconds of each step."""
        return [end - start for start, end in pairwise((self.started, *self.ended))]

    def scaled(self, steps: float) -> float:
        """Seconds of so many steps, of which the first is slower, as it starts things; the last may be a part of one.

        Raises:
            ValueError: fewer than two were taken.
        """
        if len(self.ended) < 2:
            raise ValueError(f"steps: {len(self.ended)} were timed, wanted at least 2")
        first, last = self.ended[0], self.ended[-1]
        each = (last - first) / (len(self.ended) - 1)
        return (each if self.device.type == "cuda" else first - self.started) + (steps - 1) * each

    def over(self, steps: float) -> float:
        """The same, also where the only step was timed."""
        return self.scaled(steps) if len(self.ended) > 1 else self.ended[0] - self.started


TRIED = (0.0, 0.25, 0.5, 0.75, 1.0)  # of pieces by size, from the smallest to the largest


class Pieces:
    """What many pieces of work take, from five of them: between those, time and bytes go evenly with the size.

    The smallest is done once more before, as the first work starts things, on a GPU all of them.

    Args:
        sizes: of all pieces, in a unit that time goes with.
        device: where the work runs.
        what: the pieces are called.

    Attributes:
        order: indices of the pieces to do, one after another.
        basis: these, in words.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str, what: str) -> None:
        if not sizes:
            raise ValueError(f"{what}: there are none")
        by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
        tried = sorted({by_size[round(share * (len(sizes) - 1))] for share in TRIED}, key=sizes.__getitem__)
        self._sizes, self._on_gpu = sizes, torch.device(device).type == "cuda"
        self._before = len(tried) if self._on_gpu else 1
        self.order = [*tried[: self._before], *tried]
        self.basis = f"{len(tried)} of {len(sizes)} {what}"

    def seconds(self, taken: Sequence[float]) -> float:
        """Of all pieces, if those of `order` took so long."""
        starting = 0.0 if self._on_gpu else max(0.0, taken[0] - taken[1])
        return starting + self.total(taken)

    def total(self, amounts: Sequence[float]) -> float:
        """Of what all pieces have, if those of `order` have so much."""
        measured: dict[int, list[float]] = {}
        for index, amount in list(zip(self.order, amounts, strict=True))[self._before :]:
            measured.setdefault(self._sizes[index], []).append(amount)
        known, means = list(measured), [fmean(some) for some in measured.values()]
        return sum(_between(known, means, size) for size in self._sizes)


def _between(known: Sequence[int], values: Sequence[float], size: int) -> float:
    """The value for a size, on the line between those of the known sizes, which rise."""
    if len(known) == 1:
        return values[0]
    right = max(1, bisect_left(known, size))
    low, high = known[right - 1], known[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (size - low) / (high - low)


def of_pieces(sizes: Sequence[int], work: Callable[[int], int], device: torch.device | str, what: str) -> Estimate:
    """What `Pieces` take.

    Args:
        sizes: see there.
        work: does the piece of an index, to its end; gives the bytes that it writes.
        device: see there.
        what: see there.

    Raises:
        ValueError: there are none.
    """
    pieces = Pieces(sizes, device, what)
    written, taken = [], []
    for index in pieces.order:
        started = time.perf_counter()
        written.append(work(index))
        taken.append(time.perf_counter() - started)
    return Estimate(peak_bytes(device), round(pieces.total(written)), pieces.seconds(taken), pieces.basis)


def times_tried(device: torch.device) -> int:
    """How often a piece of work is done for its time, which is that of the last: once, and once more on a GPU."""
    return 2 if device.type == "cuda" else 1


def now(device: torch.device) -> float:
    """Seconds of `time.perf_counter`, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device | str) -> int:
    """The peak so far: resident bytes of this process, or on a GPU what torch has allocated there.

    Raises:
        OSError: the system does not tell (it is not Linux).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: does not tell the peak of the memory")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum(
        {t.data_ptr() if t.device.type != "meta" else id(t): t.numel() * t.element_size() for t in tensors}.values()
    )


def _size(amount: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if amount >= 1 << power:
            return f"{amount / (1 << power):.3g} {unit}"
    return f"{amount} bytes"
