"""pi0.5 at its true size, with random weights: a chunk, a training step over many delays, and control at 50 Hz.

Weights are in bfloat16, those of the vision tower and of norms in float32, as LeRobot has them; ours has the tower in
bfloat16 (`vision_dtype`). The heads for words, which nobody asks here, are dropped. Products of float32 are in TF32 on
all sides, as LeRobot's own programs have it. LeRobot pads a prompt to 200 tokens, of which a usual one has 60. The
share of the limit is of what the tensor cores need for what is seen, and the memory for the steps after that. N passes
are N times one that was measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import BYTES_PER_SECOND, device, median, row, write
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_STATE
from pi05_random import ROBOT, Size, build, computation, fast, features, observation, stock, there
from torch import Tensor, nn

from pronghorn.vlash.bench import measure
from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import SYNC, VLASH, VLASHSettings
from pronghorn.vlash.control import ControlRecord, control_loop
from pronghorn.vlash.metrics import paper_reaction_latency, reaction_latencies
from pronghorn.vlash.runner import AsyncRunner, RunnerStatistics

OPERATIONS_PER_SECOND = {"NVIDIA H100 80GB HBM3": 989e12}  # in bf16, dense
CAMERAS = 2
BRANCHES = (4, 9)
LIMIT = 0.015  # seconds for a chunk of two cameras
SHARE = 0.85  # of the ratio of tokens
FPS, EXECUTED, OVERLAP = 50.0, 25, 2
MOMENTS = 400  # of a run, whose reactions are measured


def timed(call: Callable[[], Any], size: Size) -> dict[str, float]:
    """Seconds from the call until the result is there."""
    return median(measure(call, samples=size.repeats, warm_up=3).seconds)


@dataclass(frozen=True)
class View:
    """What a chunk is computed from.

    Attributes:
        cameras: their number.
        words: tokens of the prompt that are no padding.
    """

    cameras: int
    words: int

    def shape(self, size: Size) -> str:
        """In words."""
        cameras, steps = (
            f"{self.cameras} camera{'s' * (self.cameras > 1)}",
            f"{size.steps} step{'s' * (size.steps > 1)}",
        )
        return f"{cameras}, {self.words} tokens of text, {steps}"

    def seen(self, policy: PI05Policy, size: Size) -> dict[str, Tensor]:
        """By a policy, which is told of its cameras."""
        policy.config.input_features = features(size, self.cameras)
        return there(observation(size, self.cameras, words=self.words))


def views(size: Size) -> list[View]:
    """The first is the usual one, to which the issue's bars belong."""
    return [View(CAMERAS, size.words), View(CAMERAS, size.text), View(1, size.words), View(3, size.words)]


def chunk_rows(size: Size) -> list[dict[str, Any]]:
    """One chunk by ours and by LeRobot's as it is, and how far both are from float32."""
    policy = build(size)
    noise = torch.randn(1, size.horizon, policy.config.max_action_dim, device=device())
    policy.model.sample_noise = lambda *_: noise
    with fast(policy) as computed:
        ours, our_chunks = each(policy, lambda seen: computed.sample(seen, 0), size)
        shares = [share_of_limit(policy, size, view, time["p50"]) for view, time in zip(views(size), ours, strict=True)]
    theirs, their_chunks = each(policy, lambda seen: stock(policy, seen), size)
    rows = [
        row("one chunk", "LeRobot, eager", view.shape(size), mine, other, roofline=share, note="bf16, batch 1")
        for view, mine, other, share in zip(views(size), ours, theirs, shares, strict=True)
    ]
    rows.append(
        row("one chunk", "the limit", views(size)[0].shape(size), ours[0], median([LIMIT]), reach=1.0,
            roofline=shares[0], note="bf16, batch 1")
    )  # fmt: skip
    return [*rows, exactness(policy, size, our_chunks, their_chunks)]


def each(
    policy: PI05Policy, chunk: Callable[[dict[str, Tensor]], Tensor], size: Size
) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Seconds, and chunks, for every view."""
    times, chunks = [], []
    for view in views(size):
        seen = view.seen(policy, size)
        times.append(timed(functools.partial(chunk, seen), size))
        chunks.append(chunk(seen))
    return times, chunks


def exactness(
    policy: PI05Policy, size: Size, our_chunks: Sequence[Tensor], their_chunks: Sequence[Tensor]
) -> dict[str, Any]:
    """How far chunks are from those of the same weights in float32."""
    policy.float()
    torch.set_float32_matmul_precision("highest")
    exact = [stock(policy, view.seen(policy, size)) for view in views(size)]
    torch.set_float32_matmul_precision("high")
    ours, theirs = (
        median([float((chunk - wanted).norm() / wanted.norm()) for chunk, wanted in zip(chunks, exact, strict=True)])
        for chunks in (our_chunks, their_chunks)
    )
    return row(
        "difference from float32", "LeRobot, eager", f"{size.steps} steps", ours, theirs, unit="relative",
        note="bf16, the same weights and noise",
    )  # fmt: skip


def compiled_rows(size: Size, mode: str = "") -> list[dict[str, Any]]:
    """One chunk by ours and by LeRobot's with its option `compile_model`, in its default mode if none is given.

    All steps are one graph, so that compiling takes minutes for each of them.
    """
    torch.compiler.reset()  # of another number of steps
    policy, view = build(size), views(size)[0]
    seen = view.seen(policy, size)
    with fast(policy) as computed:
        ours = timed(lambda: computed.sample(seen, 0), size)
        share = share_of_limit(policy, size, view, ours["p50"])
    mode = mode or policy.config.compile_mode
    policy.model.sample_actions = torch.compile(policy.model.sample_actions, mode=mode)
    theirs = timed(lambda: stock(policy, seen), size)
    return [
        row("one chunk", f"LeRobot, compiled ({mode})", view.shape(size), ours, theirs, reach=2.0, roofline=share,
            note="bf16, batch 1")
    ]  # fmt: skip


def share_of_limit(policy: PI05Policy, size: Size, view: View, seconds: float) -> float | None:
    """Of the time that the hardware needs at least; None where its limits are not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if name not in OPERATIONS_PER_SECOND:
        return None
    experts = policy.model.paligemma_with_expert
    patches = view.cameras * (size.image // 14) ** 2
    limit = 2 * (patches + view.words) * parameters(experts.paligemma.model.language_model.layers)
    limit += 2 * patches * parameters(experts.paligemma.model.vision_tower)
    limit /= OPERATIONS_PER_SECOND[name]
    products = [part for key, part in experts.gemma_expert.model.layers.named_parameters() if "proj" in key]
    limit += size.steps * sum(part.nbytes for part in products) / BYTES_PER_SECOND[name]
    return limit / seconds


def parameters(module: nn.Module) -> int:
    """How many numbers."""
    return sum(part.numel() for part in module.parameters())


def shared_rows(size: Size) -> list[dict[str, Any]]:
    """Forward and backward for N delays of each sample in one pass, against N passes, images included in each."""
    policy, count = build(size).train(), CAMERAS
    policy.config.input_features = features(size, count)
    seen = there(observation(size, count, size.batch))
    ours = computation(policy, state_cond=True, shared_observation=True)
    rows = []
    tokens = count * (size.image // 14) ** 2 + size.text
    sides = {
        "N passes of ours": lambda: ours.loss(targets(seen, size, 1), delays(size, 1), "mean"),
        "N passes of LeRobot's": lambda: policy.forward(targets(seen, size, 1))[0],
    }
    once = {name: timed(lambda run=run: step(policy, run), size) for name, run in sides.items()}
    for branches in BRANCHES:
        shared = timed(
            lambda n=branches: step(policy, lambda: ours.loss(targets(seen, size, n), delays(size, n), "mean")), size
        )
        ratio = branches * (tokens + size.horizon) / (tokens + branches * size.horizon)
        rows += [
            row(f"training step, {branches} delays", name, f"{size.batch} samples, {count} cameras", shared,
                {quantile: branches * seconds for quantile, seconds in each.items()}, reach=SHARE * ratio,
                note=f"bf16, forward and backward, vision tower included; {ratio:.2f} times as many tokens")
            for name, each in once.items()
        ]  # fmt: skip
    return rows


def targets(seen: dict[str, Tensor], size: Size, branches: int) -> dict[str, Tensor]:
    """A batch to train on, with the actions and states of all delays of a sample side by side."""
    rows = size.batch * branches
    return seen | {
        ACTION: torch.randn(rows, size.horizon, ROBOT, device=device()),
        "action_is_pad": torch.zeros(rows, size.horizon, dtype=torch.bool, device=device()),
        OBS_STATE: torch.randn(rows, ROBOT, device=device()),
    }  # fmt: skip


def delays(size: Size, branches: int) -> Tensor:
    """Int64 [batch, branches]."""
    return torch.arange(branches, device=device()).expand(size.batch, branches)


def step(policy: PI05Policy, loss: Callable[[], Tensor]) -> None:
    """Forward and backward, without the optimizer's part."""
    with torch.enable_grad():
        loss().backward()
    policy.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Run:
    """What was measured in a run of control.

    Attributes:
        settings: of the run.
        record: of the control loop.
        statistics: of the runner.
    """

    settings: VLASHSettings
    record: ControlRecord
    statistics: RunnerStatistics

    @property
    def seconds_for_action(self) -> float:
        """Of the policy's; `action_quant_ratio` of them are one command."""
        times = self.record.times
        return (times[-1] - times[0]) / ((len(times) - 1) * self.settings.action_quant_ratio)

    @property
    def paper_reaction(self) -> float:
        """By the paper's formula, of the median latency."""
        return paper_reaction_latency(self.settings, self.statistics.latency_p50 or 0.0)

    def reactions(self) -> list[float]:
        """Seconds, of events at random moments that the robot still saw."""
        generator, last = random.Random(0), max(self.record.observed)
        moments = [generator.uniform(0, last) for _ in range(MOMENTS)]
        return reaction_latencies(moments, self.record.times, self.record.observed)


def control(policy: Callable[[ChunkRequest], Tensor], size: Size, async_mode: str, ratio: int = 1) -> Run:
    """A robot whose state is its last goal, in real time."""
    settings = VLASHSettings(
        async_mode=async_mode, chunk_size=size.horizon, n_action_steps=EXECUTED, fps=FPS, action_quant_ratio=ratio,
        inference_overlap_steps=0 if async_mode == SYNC else OVERLAP,
    )  # fmt: skip
    seen, place = observation(size, CAMERAS, words=size.words), torch.zeros(1, ROBOT)

    def observe() -> Observation:
        return Observation(seen, place)

    def act(goal: Tensor) -> None:
        nonlocal place
        place = goal

    with AsyncRunner(policy, settings) as runner:
        runner.step(observe)  # what is done once, as recording, is over when the robot begins
        runner.reset()
        record = control_loop(runner, observe, act, FPS, round(size.seconds * FPS))
        return Run(settings, record, runner.statistics())


def control_rows(size: Size) -> list[dict[str, Any]]:
    """The policy in the runner's thread, against the same one waited for."""
    base = build(size)
    base.config.input_features = features(size, CAMERAS)
    with fast(base) as computed:

        def policy(request: ChunkRequest) -> Tensor:
            batch = there({**request.observation.content, OBS_STATE: request.state})
            return computed.sample(batch, request.delay).cpu()  # a robot's commands are there

        seen, place = observation(size, CAMERAS, words=size.words), torch.zeros(1, ROBOT)
        policy(ChunkRequest(Observation(seen, place), place))
        sync = control(policy, size, SYNC)
        runs = {ratio: control(policy, size, VLASH, ratio) for ratio in (1, 2)}
    rows = []
    for ratio, ours in runs.items():
        of = f"{FPS:.0f} Hz, K={EXECUTED}, d={OVERLAP}, q={ratio}"
        note = f"latency {(ours.statistics.latency_p50 or 0) * 1e3:.1f} ms; {ours.record.overruns} overruns"
        rows += [
            row(f"{what}, vlash", "sync, q=1", of, median([mine]), median([other]), unit="count", note=note)
            for what, mine, other in (
                ("stalls after the start", ours.record.stalls - 1, sync.record.stalls - 1),
                ("late commands", ours.record.late_ticks, sync.record.late_ticks),
            )
        ]
        for what, mine, other, reach in (
            ("time for an action", [ours.seconds_for_action], [sync.seconds_for_action], 1.9 if ratio == 2 else None),
            ("reaction by the paper's formula", [ours.paper_reaction], [sync.paper_reaction], 17.0),
            ("reaction, measured", ours.reactions(), sync.reactions(), None),
            ("mean reaction, measured", [fmean(ours.reactions())], [fmean(sync.reactions())], None),
        ):
            rows.append(row(f"{what}, vlash", "sync, q=1", of, median(mine), median(other), reach=reach, note=note))
    return rows


PARTS = {"chunk": chunk_rows, "shared": shared_rows, "control": control_rows, "compiled": compiled_rows}


def _parts(name: str, asked: argparse.Namespace) -> list[Callable[[], list[dict[str, Any]]]]:
    """What to measure of a part, one after the other."""
    if name != "compiled":
        return [functools.partial(PARTS[name], Size())]
    return [functools.partial(compiled_rows, replace(Size(), steps=steps), asked.mode) for steps in asked.steps]


def main() -> None:
    """Measure, and write what there is after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--mode", default="", help="of torch.compile, in place of LeRobot's default")
    parser.add_argument("--steps", type=int, nargs="+", default=[Size.steps], help="of LeRobot's compiled chunks")
    parser.add_argument("--onto", type=Path, help="results of an earlier run, whose rows are kept with their commit")
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    earlier = json.loads(asked.onto.read_text()) if asked.onto else {"rows": []}
    rows: list[dict[str, Any]] = [{"commit": earlier["commit"], **row} for row in earlier["rows"]]
    for name in asked.parts or PARTS:
        start = time.monotonic()
        for part in _parts(name, asked):
            rows += part()
            write("vlash_pi05", rows)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
