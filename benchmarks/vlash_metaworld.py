"""Meta-World under growing delays: policies learnt from its scripted experts, by each method, in two scenes.

In one nothing moves by itself, an object to be taken and carried; in the other a button glides sideways, which
Meta-World's does not. Needs the LeRobot environment, for Meta-World. `--folder` keeps what was trained and measured.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from metaworld_scenes import FPS, SCENES, Arena, Demonstration, HandModel, Robots, demonstrations
from torch import Tensor, nn
from torch.nn import functional as F

from pronghorn.vlash.chunks import ChunkRequest
from pronghorn.vlash.config import MEASURED, NAIVE, RTC, RTC_FULL, SYNC, VLASH, VLASHSettings
from pronghorn.vlash.flow import integrate, interpolate, reduce_loss, sample_times, target
from pronghorn.vlash.guidance import guided_velocity
from pronghorn.vlash.offsets import apply_offset, draw_offsets
from pronghorn.vlash.quantization import merge_chunk
from pronghorn.vlash.sweep import Method, SweepRow, draw, read_rows, sweep, write_rows

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
SWEPT = ("pick-place", "gliding-button")
DELAYS = (0, 2, 4, 8)
MAX_DELAY_STEPS, CHUNK, STEPS = 8, 16, 8
WIDTH, EULER_STEPS, GUIDANCE_CAP = 256, 5, 5.0
EPISODES, HELD_OUT, NOISE = 320, 20, 0.2  # demonstrations, of which some only test the model of the hand
EVALUATED = 50
FIRST_SEED = 10**6  # of evaluations, far from the demonstrations'

PLAIN, OFFSETS, TOLD = "plain", "offsets", "told"
_TRAININGS = {PLAIN: (0, False), OFFSETS: (MAX_DELAY_STEPS, False), TOLD: (MAX_DELAY_STEPS, True)}
_MODES = {
    "sync": (SYNC, PLAIN, 1), "sync_real_time": (SYNC, PLAIN, 1), "naive": (NAIVE, PLAIN, 1), "rtc": (RTC, PLAIN, 1),
    "rtc_full": (RTC_FULL, PLAIN, 1), "roll_forward": (VLASH, PLAIN, 1), "vlash": (VLASH, OFFSETS, 1),
    "vlash+delay": (VLASH, TOLD, 1), "vlash+truth": (VLASH, OFFSETS, 1), "sync q=2": (SYNC, PLAIN, 2),
    "vlash+delay q=2": (VLASH, TOLD, 2),
}  # fmt: skip
NOTES = {
    "sync": "the world stands still while the robot waits",
    "sync_real_time": "the world goes on while the robot waits",
    "roll_forward": "the estimated state, but trained without offsets",
    "vlash+truth": "privileged: the simulator's true future state in place of the estimate",
    "sync q=2": "two actions summed to one command, which the robot cuts at 1",
    "vlash+delay q=2": "two actions summed to one command, which the robot cuts at 1",
}
ABOUT = {
    "pick-place": "nothing moves by itself",
    "gliding-button": "the button glides 3 mm a step, which Meta-World's does not",
}


class FlowPolicy(nn.Module):
    """Leads noise to chunks of actions, from what is seen, [31], and the state, [7].

    Args:
        shown: demonstrations, for the mean and deviation of what comes in.
        delay_conditioning: whether it is told the delay too, through weights that start at zero.
    """

    def __init__(self, shown: Sequence[Demonstration], *, delay_conditioning: bool = False) -> None:
        super().__init__()
        entries = torch.cat([torch.cat([each.seen, each.states], -1) for each in shown])
        self.register_buffer("mean", entries.mean(0))
        self.register_buffer("deviation", entries.std(0).clamp(min=1e-2))
        self.width = shown[0].actions.shape[-1]
        self.entry = nn.Linear(len(self.mean) + CHUNK * self.width + 1, WIDTH)
        self.delay = nn.Embedding(MAX_DELAY_STEPS + 1, WIDTH) if delay_conditioning else None
        if self.delay is not None:
            nn.init.zeros_(self.delay.weight)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, CHUNK * self.width),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, seen: Tensor, state: Tensor, delay: Tensor) -> Tensor:
        """The field's velocity, [batch, CHUNK, 4] like `x`; time and delay are [batch]."""
        entries = (torch.cat([seen, state], -1) - self.mean) / self.deviation
        hidden = self.entry(torch.cat([entries.clamp(-5, 5), x.flatten(1), time[:, None]], -1))
        if self.delay is not None:
            hidden = hidden + self.delay(delay)
        return self.rest(hidden).view(x.shape)

    def sample(self, request: ChunkRequest, generator: torch.Generator, *, guided: bool, full_jacobian: bool) -> Tensor:
        """[batch, CHUNK, 4], cut to what the robot takes; `guided` to agree with the running chunk."""
        state = request.state
        delay = torch.full((len(state),), request.delay)

        def velocity(x: Tensor, time: float) -> Tensor:
            return self(x, torch.full((len(x),), time), request.observation.content, state, delay)

        guide = None
        if guided and request.leftover is not None:
            guide = partial(
                guided_velocity, leftover=request.leftover, delay=request.delay, cap=GUIDANCE_CAP,
                full_jacobian=full_jacobian,
            )  # fmt: skip
        noise = torch.randn(len(state), CHUNK, self.width, generator=generator)
        return integrate(velocity, noise, EULER_STEPS, guide).clamp(-1, 1)


def windows(shown: Sequence[Demonstration], longest: int) -> tuple[Tensor, ...]:
    """Every step of every demonstration, with what follows for `longest` delays; ends repeat.

    Returns:
        What was seen [count, 31], states [count, longest + 1, 7], actions [count, CHUNK + longest, 4], and whether
        these are beyond the end, bool.
    """
    found = []
    for each in shown:
        at, last = torch.arange(len(each.actions))[:, None], len(each.actions) - 1
        wanted, then = at + torch.arange(CHUNK + longest), at + torch.arange(longest + 1)
        found.append(
            (each.seen, each.states[then.clamp(max=last)], each.actions[wanted.clamp(max=last)], wanted > last)
        )
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def train(shown: Sequence[Demonstration], training: str, *, steps: int, batch: int = 512, seed: int = 0) -> FlowPolicy:
    """A policy of `_TRAININGS`; shows a bar."""
    from tqdm import trange

    torch.manual_seed(seed)
    longest, told = _TRAININGS[training]
    policy = FlowPolicy(shown, delay_conditioning=told)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seen, states, actions, is_pad = windows(shown, longest)
    for _ in trange(steps, desc=f"{training} policy", leave=False):
        rows = torch.randint(len(seen), (batch,))
        delay = draw_offsets(batch, longest)
        clean, padded, state = apply_offset(
            actions[rows], is_pad[rows], states[rows, 0], delay, CHUNK, future_states=states[rows]
        )
        noise, times = torch.randn_like(clean), sample_times((batch,))
        velocity = policy(interpolate(clean, noise, times), times, seen[rows], state, delay)
        errors = F.mse_loss(velocity, target(clean, noise), reduction="none")
        loss = reduce_loss(errors, padded, exclude_padding=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy.eval()


class MetaworldTask:
    """A scene as a task for `sweep`: 8 of a chunk's 16 actions are executed, whatever the delay.

    Args:
        name: of the scene.
        make: gives an arena of it.
        train_steps: of each policy.
        shown: demonstrations, some of which are held out.
        evaluated: robots at a time.
        folder: where trained policies are kept and looked for; None trains anew.
    """

    modes = tuple(_MODES)

    def __init__(
        self, name: str, make: Callable[[], Arena], *, train_steps: int, shown: int = EPISODES,
        evaluated: int = EVALUATED, folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self._make, self._folder = name, make, folder
        self._train_steps, self._episodes, self._evaluated = train_steps, shown, evaluated
        self._policies: dict[tuple[str, int], FlowPolicy] = {}
        self._robots: Robots | None = None
        every = self._demonstrations()
        self.held_out, self.shown = every[:HELD_OUT], every[HELD_OUT:]
        self.hand = HandModel(self.shown, MAX_DELAY_STEPS)

    def _demonstrations(self) -> list[Demonstration]:
        path = self._folder and self._folder / f"{self.name}-demonstrations-{self._episodes}.pt"
        if path and path.exists():
            return [Demonstration(*parts) for parts in torch.load(path, weights_only=True)]
        every = demonstrations(self._make(), range(self._episodes), noise=NOISE)
        if path:
            torch.save([(each.seen, each.states, each.actions) for each in every], path)
        return every

    def about(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "train_steps": self._train_steps, "demonstrations": len(self.shown), "asked": self._episodes,
            "environments": self._evaluated,
        }  # fmt: skip

    def environment(self) -> Robots:
        """Of places that no demonstration begins with; one for all, since they take long to make."""
        if self._robots is None:
            self._robots = Robots(self._make, self._evaluated, FIRST_SEED)
        return self._robots

    def method(self, mode: str, delay: int, seed: int, environment: Robots) -> Method:
        """See `sweep.Task`."""
        async_mode, training, ratio = _MODES[mode]
        if not 0 <= delay * ratio <= STEPS:
            raise ValueError(f"delay: got {delay} with {mode}, wanted 0 to {STEPS // ratio}")
        settings = VLASHSettings(
            async_mode=async_mode, chunk_size=CHUNK, n_action_steps=STEPS, action_quant_ratio=ratio, fps=FPS,
            inference_overlap_steps=0 if async_mode == SYNC else delay, state_estimator=MEASURED,
            delta_dims=[0, 1, 2], max_delay_steps=MAX_DELAY_STEPS, delay_conditioning=training == TOLD,
        )  # fmt: skip
        policy = partial(
            self.policy(training, seed).sample, generator=torch.Generator().manual_seed(seed),
            guided=async_mode in (RTC, RTC_FULL), full_jacobian=async_mode == RTC_FULL,
        )  # fmt: skip
        look = environment.future if mode == "vlash+truth" else self.hand

        def estimator(state: Tensor, pending: Tensor) -> Tensor:
            return look(state, merge_chunk(pending, settings))

        return Method(settings, policy, estimator, world_waits=mode != "sync_real_time")

    def policy(self, training: str, seed: int) -> FlowPolicy:
        """A trained policy: "plain", with "offsets", or with offsets and "told" them."""
        if (training, seed) not in self._policies:
            path = self._folder and self._folder / f"{self.name}-{training}-{self._train_steps}-{seed}.pt"
            if path and path.exists():
                policy = FlowPolicy(self.shown, delay_conditioning=training == TOLD).eval()
                policy.load_state_dict(torch.load(path, weights_only=True))
            else:
                policy = train(self.shown, training, steps=self._train_steps, seed=seed)
                if path:
                    torch.save(policy.state_dict(), path)
            self._policies[training, seed] = policy
        return self._policies[training, seed]


def main() -> None:
    """Show, train, sweep, write the results, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", nargs="+", default=SWEPT, choices=SCENES)
    parser.add_argument("--train-steps", type=int, default=2500)
    parser.add_argument("--folder", type=Path, help="for policies and rows, which are taken from there if they fit")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for name in asked.scenes:
        task = MetaworldTask(name, SCENES[name].arena, train_steps=asked.train_steps, folder=asked.folder)
        path = asked.folder and asked.folder / f"{name}.json"
        rows = swept(task, path)
        _print(name, rows)
        found += results(task, rows)
        shown = [row for row in rows if row.mode not in ("vlash+truth", "roll_forward") and "q=2" not in row.mode]
        draw(
            shown, ASSETS / f"vlash_metaworld_{name.replace('-', '_')}.png", f"Meta-World, {name}: {EVALUATED} episodes"
        )
    from harness import write

    write("vlash_metaworld", found)


def swept(task: MetaworldTask, path: Path | None = None, delays: Sequence[int] = DELAYS) -> list[SweepRow]:
    """Every mode under every delay that it bears; rows in `path` are taken as they are.

    Without a delay, modes of the same policy do the same, and are run once.
    """
    known = {row.key: row for row in ([] if path is None else read_rows(path, task))}
    wanted = []
    for mode in task.modes:
        start, like = time.monotonic(), _MODES[mode][1:]
        twins = (known[twin, 0, 0] for twin in task.modes if _MODES[twin][1:] == like and (twin, 0, 0) in known)
        twin = next(twins, None)
        if twin is not None:
            known[mode, 0, 0] = replace(twin, mode=mode)
        borne = [delay for delay in delays if delay * _MODES[mode][2] <= STEPS]
        for row in sweep(task, [mode], borne, [0], list(known.values())):
            known[row.key] = row
            wanted.append(row)
            if path is not None:
                write_rows(path, task, list(known.values()))
        print(f"{task.name}, {mode}: {time.monotonic() - start:.0f} s", flush=True)
    return wanted


def results(task: MetaworldTask, rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """For `harness.write`: each mode against sync, commands against naive ones; and the errors of the estimate."""
    from harness import median, row

    known = {(each.mode, each.delay): each for each in rows}
    shape, found, about = f"{rows[0].episodes} episodes, K={STEPS}", [], ABOUT.get(task.name)

    def compare(what: str, ours: SweepRow, theirs: SweepRow, name: str, unit: str) -> None:
        spread = _share if name == "success" else _same
        if (getattr(ours, name) or name == "success") and getattr(theirs, name):  # else there is no ratio
            found.append(
                row(f"{task.name}: {what}, {ours.mode}, delay {ours.delay}", f"{theirs.mode}, delay {theirs.delay}",
                    shape, spread(ours, name), spread(theirs, name), unit=unit, higher_is_better=name == "success",
                    note="; ".join(filter(None, [about, NOTES.get(ours.mode)])))
            )  # fmt: skip

    for (_, delay), ours in known.items():
        if ("naive", delay) in known:
            compare("boundary jump", ours, known["naive", delay], "boundary_jump", "action")
            compare("jerk", ours, known["naive", delay], "jerk", "action/s³")
        if ("sync", delay) in known:
            compare("success", ours, known["sync", delay], "success", "success")
            compare("commands an episode, failed ones too", ours, known["sync", delay], "steps", "commands")
            compare("time", ours, known["sync", delay], "seconds", "s")
        if delay and ("sync", delay) in known:
            compare("stalls", ours, known["sync", delay], "stalls", "stalls")
            compare("expected reaction", ours, known["sync", delay], "reaction_mean", "s")
            compare("reaction by the paper's formula", ours, known["sync", delay], "reaction_paper", "s")
    for steps in (1, 2, 4, 8):
        errors = task.hand.errors(task.held_out, steps)
        for against in ("measured", "sum"):
            found.append(
                row(f"{task.name}: error of the hand's place, {steps} steps ahead", against,
                    f"{len(task.held_out)} demonstrations held out", median(errors["model"]), median(errors[against]),
                    unit="m", note="against the simulator's; sum: as far as the setpoint moves")
            )  # fmt: skip
    return found


def _share(of: SweepRow, name: str) -> dict[str, float]:
    """A share, give or take what 60 % of repetitions with other episodes would stay within."""
    share = getattr(of, name)
    spread = 0.84 * math.sqrt(share * (1 - share) / of.episodes)
    return {"p20": share - spread, "p50": share, "p80": share + spread}


def _same(of: SweepRow, name: str) -> dict[str, float]:
    return dict.fromkeys(("p20", "p50", "p80"), getattr(of, name))


def _print(name: str, rows: Sequence[SweepRow]) -> None:
    print(name, "success and commands")
    for mode in dict.fromkeys(row.mode for row in rows):
        cells = [f"{row.success:.2f} {row.steps:5.1f}" for row in rows if row.mode == mode]
        print(f"{mode:16}", " | ".join(cells))


if __name__ == "__main__":
    main()
