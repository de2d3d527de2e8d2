"""A toy in which delay hurts: a point robot that follows a target which moves on, bounces, and turns at random."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pronghorn.estimate import Estimate, peak_bytes, tensor_bytes
from pronghorn.files.tensor_files import load_tensors, save_tensors
from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import NAIVE, RTC, RTC_FULL, SUM_DELTA, SYNC, VLASH, VLASHSettings
from pronghorn.vlash.flow import integrate, interpolate, target
from pronghorn.vlash.guidance import guided_velocity
from pronghorn.vlash.offsets import apply_offset, draw_offsets
from pronghorn.vlash.sweep import Method, sweep

FORMAT = 2  # of a policy's file
REACH = 0.12  # the most that the robot moves in a step, each way
SPEED = 0.06  # of the target, in a step
GAIN = 0.8  # of the way that the expert goes in a step
HIT = 0.1  # distance below which the target is held
SETTLED = 50  # steps before which nothing counts
CHUNK, WIDTH, EULER_STEPS = 8, 192, 5
MAX_DELAY_STEPS = 4
_TRIED = (20, 120)  # steps of training in a rehearsal
GUIDANCE_CAP = 5.0  # of guidance, as in the Kinetix experiments


class TrackingEnvironment:
    """Robots in a plane, each with a target; all randomness is drawn at `reset`, so actions do not change it.

    What is seen is the target, [count, 4]: where it is, and ten times its last step. The state is the robot's place,
    [count, 2]; an action, [count, 2], is a step, cut to `REACH` each way, to which noise is added.

    Args:
        count: robots at a time.
        horizon: steps of an episode.
        turn: how likely the target takes another direction in a step.
        noise: deviation of what is added to the robot's step.
    """

    def __init__(self, count: int = 512, *, horizon: int = 200, turn: float = 0.03, noise: float = 0.01) -> None:
        self.count, self.horizon, self._turn, self._noise = count, horizon, turn, noise
        self.finished = torch.zeros(count, dtype=torch.bool)

    def reset(self, seed: int) -> Observation:
        """Begin another episode."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.horizon + 1, self.count)
        place, self.robot = torch.rand(2, self.count, 2, generator=generator) * 2 - 1
        turns = torch.rand(*shape, 1, generator=generator) < self._turn
        angles = torch.rand(shape, generator=generator) * 2 * math.pi
        headings = SPEED * torch.stack([angles.cos(), angles.sin()], -1)
        self._slips = self._noise * torch.randn(*shape, 2, generator=generator)

        targets, step = [torch.cat([place, headings[0]], -1)], headings[0]
        for turned, heading in zip(turns[1:], headings[1:], strict=True):
            place, step = moved(place, torch.where(turned, heading, step))
            targets.append(torch.cat([place, step], -1))
        self._targets = torch.stack(targets)
        self._hits, self._time = torch.zeros(self.count), 0
        self.finished = torch.zeros(self.count, dtype=torch.bool)
        return self._observation()

    def step(self, action: Tensor) -> Observation:
        """Move robots and targets."""
        self.robot = self.future(self.robot, action[:, None])
        self._time += 1
        if self._time > SETTLED:
            self._hits += self.distance < HIT
        self.finished = torch.full((self.count,), self._time >= self.horizon)
        return self._observation()

    @property
    def target(self) -> Tensor:
        """[count, 2], where the targets are."""
        return self._targets[self._time, :, :2]

    @property
    def distance(self) -> Tensor:
        """[count], from robots to targets."""
        return (self.robot - self.target).norm(dim=-1)

    def success(self) -> Tensor:
        """[count], share of steps, without the first `SETTLED`, in which the robot was nearer than `HIT`."""
        return self._hits / max(self._time - SETTLED, 1)

    def future(self, state: Tensor, pending: Tensor) -> Tensor:
        """The true state after pending actions, noise to come included: what no robot knows."""
        slips = self._slips[self._time : self._time + pending.shape[1]].transpose(0, 1)
        return state + (pending.clamp(-REACH, REACH) + slips).sum(1)

    def _observation(self) -> Observation:
        return Observation(self._targets[self._time] * torch.tensor([1.0, 1.0, 10.0, 10.0]), self.robot)


def moved(place: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Targets a step on, and their next steps, bounced at the edges of [-1, 1]; both [..., 2]."""
    place = place + step
    out = place.abs() > 1
    return torch.where(out, 2 * place.sign() - place, place), torch.where(out, -step, step)


def expert_action(seen: Tensor, state: Tensor) -> Tensor:
    """[..., 2], most of the way to where the target will be, from what is seen of it, [..., 4], and the state."""
    return (GAIN * (seen[..., :2] + seen[..., 2:] / 10 - state)).clamp(-REACH, REACH)


class ExpertPolicy:
    """Plans the expert's actions for a target that does not turn: the best that can be done with what was seen.

    Args:
        told_delay: whether it knows how old the observation is; otherwise it takes it for fresh.
    """

    def __init__(self, *, told_delay: bool) -> None:
        self._told_delay = told_delay

    def __call__(self, request: ChunkRequest) -> Tensor:
        """[..., CHUNK, 2]."""
        place, step = request.observation.content.split(2, -1)
        state, step = request.state, step / 10
        for _ in range(request.delay if self._told_delay else 0):
            place, step = moved(place, step)
        actions = []
        for _ in range(CHUNK):
            actions.append(expert_action(torch.cat([place, 10 * step], -1), state))
            state = state + actions[-1]
            place, step = moved(place, step)
        return torch.stack(actions, -2)


class FlowPolicy(nn.Module):
    """A flow-matching policy: three layers that lead noise to a chunk of actions, whose unit is `REACH`.

    Args:
        delay_conditioning: whether the first layer also takes the delay, through weights that start at zero.
    """

    def __init__(self, *, delay_conditioning: bool = False) -> None:
        super().__init__()
        self.entry = nn.Linear(4 + 2 + 2 * CHUNK + 1, WIDTH)
        self.delay = nn.Embedding(MAX_DELAY_STEPS + 1, WIDTH) if delay_conditioning else None
        if self.delay is not None:
            nn.init.zeros_(self.delay.weight)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, 2 * CHUNK),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, seen: Tensor, state: Tensor, delay: Tensor) -> Tensor:
        """The field's velocity.

        Args:
            x: [batch, CHUNK, 2].
            time: [batch], 1 is noise, 0 actions.
            seen: [batch, 4], of the target.
            state: [batch, 2].
            delay: [batch], integers up to `MAX_DELAY_STEPS`.

        Returns:
            [batch, CHUNK, 2].
        """
        hidden = self.entry(torch.cat([seen, state, x.flatten(1), time[:, None]], -1))
        if self.delay is not None:
            hidden = hidden + self.delay(delay)
        return self.rest(hidden).view(x.shape)

    def loss(self, actions: Tensor, seen: Tensor, state: Tensor, delay: Tensor) -> Tensor:
        """Flow matching: squared error of the velocity at random times, a scalar; `actions` are [batch, CHUNK, 2]."""
        clean, noise, time = actions / REACH, torch.randn_like(actions), torch.rand(len(actions))
        velocity = self(interpolate(clean, noise, time), time, seen, state, delay)
        return F.mse_loss(velocity, target(clean, noise))

    def sample(
        self, request: ChunkRequest, generator: torch.Generator, *, guided: bool = False, full_jacobian: bool = False
    ) -> Tensor:
        """[batch, CHUNK, 2], in Euler steps from noise; `guided` to agree with the running chunk."""
        state = request.state
        delay = torch.full((len(state),), request.delay)

        def velocity(x: Tensor, time: float) -> Tensor:
            return self(x, torch.full((len(x),), time), request.observation.content, state, delay)

        guide = None
        if guided and request.leftover is not None:
            guide = partial(
                guided_velocity, leftover=request.leftover / REACH, delay=request.delay, cap=GUIDANCE_CAP,
                full_jacobian=full_jacobian,
            )  # fmt: skip
        noise = torch.randn(len(state), CHUNK, 2, generator=generator)
        return integrate(velocity, noise, EULER_STEPS, guide) * REACH


def demonstrations(
    environment: TrackingEnvironment, seed: int, max_delay_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The expert's actions, each robot's from a delay of its own on, drawn from 0 to `max_delay_steps`.

    Returns:
        Actions [count, CHUNK, 2] from the delay on, what was seen before it [count, 4], the state after it [count, 2],
        and the delay [count].
    """
    observation = environment.reset(seed)
    seen, states, actions = observation.content, [], []
    for _ in range(max_delay_steps + CHUNK):
        states.append(observation.state)
        actions.append(expert_action(observation.content, observation.state))
        observation = environment.step(actions[-1])
    delay = draw_offsets(environment.count, max_delay_steps)
    window, within = torch.stack(actions, 1), torch.zeros(environment.count, len(actions), dtype=torch.bool)
    future_states = torch.stack(states[: max_delay_steps + 1], 1)
    wanted, _, state = apply_offset(window, within, states[0], delay, CHUNK, future_states=future_states)
    return wanted, seen, state, delay


def train(
    *, max_delay_steps: int = MAX_DELAY_STEPS, delay_conditioning: bool = False, steps: int = 6000, batch: int = 512,
    seed: int = 0,
) -> FlowPolicy:  # fmt: skip
    """A policy learnt from demonstrations that are new in every step; shows a bar.

    Args:
        max_delay_steps: the largest offset between what is seen and the state, up to `MAX_DELAY_STEPS`.
        delay_conditioning: tell the policy that offset.
        steps: of AdamW, whose learning rate falls from 1e-3 on a cosine.
        batch: demonstrations in a step.
        seed: of weights, noise and demonstrations.

    Raises:
        ValueError: there is no step.
    """
    from tqdm import trange

    if steps < 1:
        raise ValueError(f"steps: got {steps}, wanted at least 1")

    torch.manual_seed(seed)
    policy = FlowPolicy(delay_conditioning=delay_conditioning)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    environment = TrackingEnvironment(batch, horizon=max_delay_steps + CHUNK)
    for number in trange(steps, desc="tracking policy", leave=False):
        # Seeds far from those of evaluations.
        loss = policy.loss(*demonstrations(environment, (seed + 1) * 10**6 + number, max_delay_steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy.eval()


PLAIN, OFFSETS, TOLD, EXPERT = "plain", "offsets", "told", "expert"
_TRAININGS: dict[str, dict[str, Any]] = {
    PLAIN: {"max_delay_steps": 0}, OFFSETS: {}, TOLD: {"delay_conditioning": True},
}  # fmt: skip
_MODES = {
    "sync": (SYNC, PLAIN), "sync_real_time": (SYNC, PLAIN), "naive": (NAIVE, PLAIN), "rtc": (RTC, PLAIN),
    "rtc_full": (RTC_FULL, PLAIN), "roll_forward": (VLASH, PLAIN), "vlash": (VLASH, OFFSETS),
    "vlash+delay": (VLASH, TOLD), "vlash+truth": (VLASH, OFFSETS), "expert": (VLASH, EXPERT),
}  # fmt: skip


class TrackingTask:
    """The toy as a task for `sweep`; a chunk is executed as long as the policy takes for the next one.

    Its modes are those of `VLASHSettings`, all but vlash with a policy that never saw an offset, and
    - "sync_real_time": sync in a world that does not wait for it, as targets do not;
    - "roll_forward": vlash with the policy that never saw an offset;
    - "vlash+delay": told the delay;
    - "vlash+truth": given the true future state in place of an estimate, noise to come included;
    - "expert": the expert's plan from the estimate, told the delay: the best that can be done with what was seen.

    Args:
        train_steps: of each policy.
        environments: robots at a time.
        folder: where trained policies are kept and looked for; None trains anew.
    """

    name = "tracking"
    modes = tuple(_MODES)

    def __init__(self, *, train_steps: int = 6000, environments: int = 512, folder: Path | None = None) -> None:
        self._train_steps, self._environments, self._folder = train_steps, environments, folder
        self._policies: dict[tuple[str, int], FlowPolicy] = {}

    def about(self) -> dict[str, Any]:
        """For JSON."""
        return {"train_steps": self._train_steps, "environments": self._environments}

    def environment(self) -> TrackingEnvironment:
        """Of as many robots."""
        return TrackingEnvironment(self._environments)

    def method(self, mode: str, delay: int, seed: int, environment: TrackingEnvironment) -> Method:
        """See `sweep.Task`."""
        if not 0 <= delay <= MAX_DELAY_STEPS:
            raise ValueError(f"delay: got {delay}, wanted 0 to {MAX_DELAY_STEPS}")
        async_mode, training = _MODES[mode]
        settings = VLASHSettings(
            async_mode=async_mode, chunk_size=CHUNK, n_action_steps=max(delay, 1),
            inference_overlap_steps=0 if async_mode == SYNC else delay, state_estimator=SUM_DELTA,
            action_low=[-REACH] * 2, action_high=[REACH] * 2, max_delay_steps=MAX_DELAY_STEPS,
            delay_conditioning=training == TOLD,
        )  # fmt: skip
        if training == EXPERT:
            return Method(settings, ExpertPolicy(told_delay=True))
        policy = partial(
            self.policy(training, seed).sample, generator=torch.Generator().manual_seed(seed),
            guided=async_mode in (RTC, RTC_FULL), full_jacobian=async_mode == RTC_FULL,
        )  # fmt: skip
        estimator = environment.future if mode == "vlash+truth" else None
        return Method(settings, policy, estimator, world_waits=mode != "sync_real_time")

    def policy(self, training: str, seed: int) -> FlowPolicy:
        """A trained policy: "plain", with "offsets", or with offsets and "told" them."""
        known = self._policies.get((training, seed))
        if known is not None:
            return known
        path = self._folder and self._folder / f"tracking-{training}-{self._train_steps}-{seed}.safetensors"
        if path and path.exists():
            policy = FlowPolicy(delay_conditioning=training == TOLD).eval()
            weights, _ = load_tensors(path, newest=FORMAT)
            wanted = policy.state_dict()
            wrong = sorted(set(weights) ^ set(wanted)) or sorted(
                name for name, weight in weights.items()
                if (weight.shape, weight.dtype) != (wanted[name].shape, wanted[name].dtype)
                or not bool(weight.isfinite().all())
            )  # fmt: skip
            if wrong:
                raise ValueError(f"{path}: {wrong[0]}: missing, unknown, of another shape, or not finite")
            policy.load_state_dict(weights)
        else:
            policy = train(**_TRAININGS[training], steps=self._train_steps, seed=seed)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors(path, policy.state_dict(), format=FORMAT)
        self._policies[training, seed] = policy
        return policy


def rehearse(
    modes: Sequence[str], delays: Sequence[int], seeds: int, *, train_steps: int, environments: int, folder: Path | None
) -> Estimate:
    """What a sweep of this task takes: some steps of training, then one seed of every method under every delay.

    Args:
        modes: of `TrackingTask.modes`.
        delays: control periods that the policy takes.
        seeds: how many.
        train_steps: of each policy.
        environments: robots at a time.
        folder: where policies are kept; without one they are not counted as written.

    Raises:
        ValueError: a mode or delay is not one of the task's.
    """
    few, more = _TRIED
    train(**_TRAININGS[PLAIN], steps=1, seed=0)  # what is slow once is no part of a step
    seconds = []
    for steps in _TRIED:
        started = time.perf_counter()
        policy = train(**_TRAININGS[PLAIN], steps=steps, seed=0)
        seconds.append(time.perf_counter() - started)
    of_step = (seconds[1] - seconds[0]) / (more - few)
    trial = TrackingTask(train_steps=few, environments=environments)
    trainings = {_MODES[mode][1] for mode in modes if mode in _MODES} - {EXPERT}
    for training in trainings:
        trial.policy(training, 0)
    started = time.perf_counter()
    rows = [row.to_dict() for row in sweep(trial, modes, delays, [0])]
    runs = time.perf_counter() - started
    kept = 0 if folder is None else len(trainings) * seeds * tensor_bytes(list(policy.state_dict().values()))
    return Estimate(
        peak_bytes("cpu"), kept + seeds * len(json.dumps(rows, indent=1)),
        seeds * (runs + len(trainings) * train_steps * of_step), f"{more} steps of training, one of {seeds} seeds",
    )  # fmt: skip
