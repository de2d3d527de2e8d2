"""Meta-World's arm before an object, for `pronghorn.vlash.sweep`: scenes, demonstrations, a model of the hand.

An action is Meta-World's: how far to shift the hand's setpoint, in units of `UNIT`, and the gripper's effort. The state
is what a robot knows of itself, [7]: where its hand is, where its setpoint is, and how far the gripper is open. All
else that Meta-World shows, [31], is what a camera would see: the object and the goal, now and one step ago.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pronghorn.vlash.chunks import Observation

UNIT = 0.01  # metres that the setpoint moves in a step by an action of 1
FPS = 80.0  # Meta-World's own: 5 simulated steps of 2.5 ms
HORIZON = 150
HAND, SETPOINT, GRIPPER = slice(0, 3), slice(3, 6), slice(6, 7)
OWN = [0, 1, 2, 3, 18, 19, 20, 21]  # of Meta-World's 39: the robot's own, now and one step ago
EDGE = 0.12  # metres from the middle, where what glides turns round

Seen = tuple[np.ndarray, np.ndarray]
"""What is seen, [31], and the state, [7]."""


class Arena(Protocol):
    """One robot, in simulated time."""

    def reset(self, seed: int) -> Seen:
        """Begin; the same seed gives the same place of everything."""
        ...

    def step(self, action: np.ndarray) -> tuple[Seen, bool]:
        """Execute an action, [4]; and whether the task is done."""
        ...

    def expert(self) -> np.ndarray:
        """What the scripted expert would do now, [4]."""
        ...

    def future(self, actions: np.ndarray) -> np.ndarray:
        """The true state, [7], after [steps, 4] more actions; nothing of it stays."""
        ...


@dataclass(frozen=True)
class Scene:
    """A task of Meta-World.

    Attributes:
        task: its name there.
        glide: metres a step that the body `box` moves sideways, to and fro; 0 leaves all as Meta-World has it.
    """

    task: str
    glide: float = 0.0

    def arena(self) -> MetaworldArena:
        """A new one."""
        return MetaworldArena(self)


SCENES = {
    "pick-place": Scene("pick-place-v3"),
    "button": Scene("button-press-v3"),
    "gliding-button": Scene("button-press-v3", glide=0.003),
}  # fmt: skip


class MetaworldArena:
    """Meta-World's simulation of a scene, and its scripted expert."""

    def __init__(self, scene: Scene) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP

        self._env: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{scene.task}-goal-observable"](seed=0)
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        self._expert = ENV_POLICY_MAP[scene.task]()
        self._box = self._env.model.body("box") if scene.glide else None
        self._glide = scene.glide

    def reset(self, seed: int) -> Seen:
        """See `Arena`."""
        self._env.seed(seed)
        self._all, _ = self._env.reset()
        self._heading = self._glide * (1 if seed % 2 else -1)
        return self._seen()

    def step(self, action: np.ndarray) -> tuple[Seen, bool]:
        """See `Arena`."""
        self._heading = self._glided(self._heading)
        if self._box is not None:
            self._env._target_pos[0] = self._box.pos[0]
        self._all, _, _, _, info = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        return self._seen(), bool(info["success"])

    def expert(self) -> np.ndarray:
        """See `Arena`."""
        with warnings.catch_warnings():  # that actions are cut to what the robot takes, which is meant
            warnings.simplefilter("ignore")
            return np.clip(self._expert.get_action(self._all), -1, 1)

    def future(self, actions: np.ndarray) -> np.ndarray:
        """See `Arena`."""
        import mujoco

        env, everything = self._env, mujoco.mjtState.mjSTATE_INTEGRATION
        kept = np.empty(mujoco.mj_stateSize(env.model, everything))
        mujoco.mj_getState(env.model, env.data, kept, everything)
        place, heading = None if self._box is None else self._box.pos.copy(), self._heading
        for action in np.clip(actions, -1, 1):
            heading = self._glided(heading)
            env.set_xyz_action(action[:3])
            env.do_simulation([action[3], -action[3]], n_frames=env.frame_skip)
        mujoco.mj_forward(env.model, env.data)
        after = self._own(env._get_curr_obs_combined_no_goal())
        if self._box is not None:
            self._box.pos = place
        mujoco.mj_setState(env.model, env.data, kept, everything)
        mujoco.mj_forward(env.model, env.data)
        return after

    def _glided(self, heading: float) -> float:
        if self._box is not None:
            if abs(self._box.pos[0] + heading) > EDGE:
                heading = -heading
            self._box.pos[0] += heading
        return heading

    def _seen(self) -> Seen:
        return np.delete(self._all, OWN), self._own(self._all)

    def _own(self, seen: np.ndarray) -> np.ndarray:
        return np.concatenate([seen[:3], self._env.data.mocap_pos[0], seen[3:4]])


class Robots:
    """Several arenas in lock step: an `Environment` for `sweep`. One whose task is done stops there.

    Args:
        make: gives an arena.
        count: how many.
        first_seed: of the first arena in episode 0; episodes and arenas have seeds of their own.
        horizon: steps of an episode at most.
    """

    def __init__(self, make: Callable[[], Arena], count: int, first_seed: int, horizon: int = HORIZON) -> None:
        self._arenas = [make() for _ in range(count)]
        self._first_seed, self.horizon = first_seed, horizon
        self.finished = torch.zeros(count, dtype=torch.bool)

    def reset(self, seed: int) -> Observation:
        """Begin."""
        first = self._first_seed + seed * len(self._arenas)
        self._seen = [arena.reset(first + number) for number, arena in enumerate(self._arenas)]
        self.finished = torch.zeros(len(self._arenas), dtype=torch.bool)
        return self._observation()

    def step(self, action: Tensor) -> Observation:
        """Execute a command, [count, 4]."""
        for number, command in enumerate(action.numpy()):
            if not self.finished[number]:
                self._seen[number], done = self._arenas[number].step(command)
                self.finished[number] = done
        return self._observation()

    def success(self) -> Tensor:
        """[count], 1 where the task is done."""
        return self.finished.float()

    def future(self, state: Tensor, pending: Tensor) -> Tensor:
        """The true state after pending actions, [count, steps, 4]: what only a simulator knows."""
        after = state.clone()
        for number, actions in enumerate(pending.numpy()):
            if not self.finished[number]:
                after[number] = torch.from_numpy(self._arenas[number].future(actions)).float()
        return after

    def _observation(self) -> Observation:
        seen, states = zip(*self._seen, strict=True)
        return Observation(torch.from_numpy(np.stack(seen)).float(), torch.from_numpy(np.stack(states)).float())


@dataclass(frozen=True)
class Demonstration:
    """One episode, T steps.

    Attributes:
        seen: [T, 31].
        states: [T, 7].
        actions: [T, 4], the expert's at each step; what was executed differs from them by noise.
    """

    seen: Tensor
    states: Tensor
    actions: Tensor


def demonstrations(
    arena: Arena, seeds: Sequence[int], *, noise: float = 0.3, hold: int = 5, horizon: int = HORIZON
) -> list[Demonstration]:
    """Episodes of the expert that end well, each disturbed by noise that changes every `hold` steps.

    Args:
        arena: where.
        seeds: of the episodes.
        noise: deviation of what is added to the hand's shift, of 1.
        hold: steps.
        horizon: steps after which an episode has failed, and is left out.
    """
    from tqdm import tqdm

    found = []
    for seed in tqdm(seeds, desc="demonstrations", leave=False):
        generator = np.random.default_rng(seed)
        steps, done, now = [], False, arena.reset(seed)
        while not done and len(steps) < horizon:
            if len(steps) % hold == 0:
                slip = np.append(noise * generator.normal(size=3), 0.0)
            wanted = arena.expert()
            steps.append((*now, wanted))
            now, done = arena.step(np.clip(wanted + slip, -1, 1))
        if done:
            found.append(
                Demonstration(*(torch.from_numpy(np.stack(part)).float() for part in zip(*steps, strict=True)))
            )
    return found


class HandModel:
    """Where the hand will be: the setpoint after pending actions is exact, and the hand is on its way to it.

    hand + a_n (setpoint then - setpoint now) + b_n (setpoint now - hand), for each number n of steps; the two numbers
    are fitted to demonstrations, which also tell between which places the setpoint is kept.

    Args:
        demonstrations: to fit.
        most: steps ahead at most.
    """

    def __init__(self, demonstrations: Sequence[Demonstration], most: int) -> None:
        self._weights = []
        for steps in range(1, most + 1):
            now, then = _pairs(demonstrations, steps)
            causes = torch.stack([then[:, SETPOINT] - now[:, SETPOINT], now[:, SETPOINT] - now[:, HAND]], -1)
            effect = then[:, HAND] - now[:, HAND]
            fitted = torch.linalg.lstsq(causes.flatten(0, 1).double(), effect.flatten()[:, None].double())
            self._weights.append(fitted.solution[:, 0].tolist())
        every = torch.cat([each.states[:, SETPOINT] for each in demonstrations])
        self._low, self._high = every.min(0).values, every.max(0).values

    def __call__(self, state: Tensor, pending: Tensor) -> Tensor:
        """[..., 7] from a state and pending commands [..., steps, 4], as many steps as were fitted at most."""
        setpoint = state[..., SETPOINT]
        for command in pending.clamp(-1, 1).unbind(-2):
            setpoint = (setpoint + UNIT * command[..., :3]).clamp(self._low, self._high)
        return self.moved(state, setpoint, pending.shape[-2])

    def moved(self, state: Tensor, setpoint: Tensor, steps: int) -> Tensor:
        """The state when the setpoint has become that, after so many steps."""
        hand = state[..., HAND]
        if steps:
            gain, lead = self._weights[steps - 1]
            hand = hand + gain * (setpoint - state[..., SETPOINT]) + lead * (state[..., SETPOINT] - hand)
        return torch.cat([hand, setpoint, state[..., GRIPPER]], -1)

    def errors(self, demonstrations: Sequence[Demonstration], steps: int) -> dict[str, list[float]]:
        """Metres between where the hand was after so many steps and where it was thought to be, sorted, by estimates.

        "measured" takes it to stay, "sum" to move as far as its setpoint, and "model" is this model.
        """
        now, then = _pairs(demonstrations, steps)
        hands = {
            "measured": now[:, HAND], "sum": now[:, HAND] + then[:, SETPOINT] - now[:, SETPOINT],
            "model": self.moved(now, then[:, SETPOINT], steps)[:, HAND],
        }  # fmt: skip
        return {name: (hand - then[:, HAND]).norm(dim=-1).sort().values.tolist() for name, hand in hands.items()}


def _pairs(demonstrations: Sequence[Demonstration], steps: int) -> tuple[Tensor, Tensor]:
    """[count, 7] twice: states, and those so many steps later."""
    return (
        torch.cat([each.states[:-steps] for each in demonstrations]),
        torch.cat([each.states[steps:] for each in demonstrations]),
    )
