"""gym-pusht through LeRobot's own `lerobot-train` and `lerobot-eval`, with the plugin, from data made here.

A small ACT, trained for a few minutes by an expert that does not turn the T, hardly ever moves it: rewards are about
those of the places where episodes begin. What is shown is that everything runs end to end, and what delays do to
commands; nothing is shown of how well the T is pushed. Needs the LeRobot environment.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch

from pronghorn.vlash.metrics import boundary_jump, jerk

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "vlash_pusht.png"
FPS, EDGE = 10, 512
ENVIRONMENT = "environment_state_agent_pos"
ACT = {
    "dim_model": 64, "n_heads": 4, "dim_feedforward": 256, "n_encoder_layers": 2, "n_vae_encoder_layers": 1,
    "latent_dim": 8, "use_vae": False, "optimizer_lr": 5e-4,
}  # fmt: skip
CHUNK, STEPS, MAX_DELAY_STEPS = 24, 8, 8
PLAIN, TOLD = "plain", "told"
TRAININGS = {
    PLAIN: ["--policy.max_delay_steps=0"],
    TOLD: [f"--policy.max_delay_steps={MAX_DELAY_STEPS}", "--policy.delay_conditioning=true"],
}


@dataclass(frozen=True)
class Case:
    """What is evaluated: a mode, with a delay of `overlap` commands, and q."""

    mode: str
    overlap: int = 0
    ratio: int = 1

    @property
    def training(self) -> str:
        """Which checkpoint."""
        return TOLD if self.mode == "vlash" else PLAIN


CASES = (
    Case("sync"), *(Case(mode, overlap) for mode in ("naive", "vlash") for overlap in (2, 4, 8)), Case("vlash", 0),
    Case("sync", 0, 2),
    *(Case(mode, overlap, 2) for mode in ("naive", "vlash") for overlap in (2, 4)),
)  # fmt: skip


@dataclass
class Commands:
    """What the policy sent in one batch of episodes: each [episodes, 2], and of which chunk it was."""

    actions: list[torch.Tensor] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    @property
    def boundaries(self) -> list[int]:
        """The commands that begin a chunk."""
        return [step for step in range(1, len(self.chunks)) if self.chunks[step] != self.chunks[step - 1]]


def expert(environment: gym.Env[Any, Any]) -> np.ndarray:
    """[2], where the agent is to go: round the T until the goal is behind it, then on; it is not turned on purpose."""
    core = environment.unwrapped
    agent, block = np.array(core.agent.position), core.block
    goal = core.get_goal_pose_body(core.goal_pose)
    center, aim = (np.array(body.local_to_world(block.center_of_gravity)) for body in (block, goal))
    way, seen = aim - center, agent - center
    distance = float(np.linalg.norm(way))
    if distance < 6:
        return agent
    along = way / distance
    across = np.array([-along[1], along[0]])
    if seen @ along < -20 and abs(seen @ across) < 15:
        return np.clip(agent + np.clip(distance / 2, 8, 30) * along - 0.5 * (seen @ across) * across, 10, EDGE - 10)
    behind = -85 * along
    now, then = (math.atan2(place[1], place[0]) for place in (seen, behind))
    rest = math.remainder(then - now, 2 * math.pi)
    if abs(rest) < 0.3:
        return np.clip(center + behind, 10, EDGE - 10)
    turned = now + max(min(rest, 0.5), -0.5)
    return np.clip(center + 115 * np.array([math.cos(turned), math.sin(turned)]), 10, EDGE - 10)


def make_dataset(root: Path, episodes: int, steps: int) -> list[float]:
    """The expert's episodes, disturbed by noise, in LeRobot's format; gives the largest reward of each."""
    import gym_pusht  # noqa: F401 - registers the environment
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shapes = {"observation.environment_state": 16, "observation.state": 2, "action": 2}
    dataset = LeRobotDataset.create(
        repo_id="pusht/local", fps=FPS, root=root, use_videos=False,
        features={
            name: {"dtype": "float32", "shape": (size,), "names": [f"{name[0]}{number}" for number in range(size)]}
            for name, size in shapes.items()
        },
    )  # fmt: skip
    environment = gym.make("gym_pusht/PushT-v0", obs_type=ENVIRONMENT, max_episode_steps=steps + 1)
    generator, best = np.random.default_rng(0), []
    for episode in range(episodes):
        # Evaluations begin at other seeds.
        seen, rewards = environment.reset(seed=10**5 + episode)[0], []
        for _ in range(steps):
            wanted = expert(environment)
            frame = (seen["environment_state"], seen["agent_pos"], wanted)
            dataset.add_frame(
                {name: np.float32(value) for name, value in zip(shapes, frame, strict=True)} | {"task": "push the T"}
            )
            seen, reward, done, _, _ = environment.step(np.clip(wanted + generator.normal(0, 10, 2), 0, EDGE))
            rewards.append(reward)
            if done:
                break
        dataset.save_episode()
        best.append(max(rewards))
    dataset.finalize()
    return best


def command(program: Callable[[], object], name: str, *arguments: str) -> None:
    """One of LeRobot's programs, in this process."""
    print("$", name, shlex.join(arguments), flush=True)
    with patch.object(sys, "argv", [name, *arguments]):
        program()


def train(root: Path, output: Path, training: str, steps: int) -> Path:
    """The folder of a checkpoint."""
    from lerobot.scripts.lerobot_train import main

    command(
        main, "lerobot-train", "--policy.type=vlash", "--policy.base=act", f"--policy.base_config={json.dumps(ACT)}",
        f"--policy.chunk_size={CHUNK}", f"--policy.n_action_steps={STEPS}", *TRAININGS[training],
        "--policy.device=cpu", "--policy.push_to_hub=false", "--dataset.repo_id=pusht/local",
        f"--dataset.root={root}", f"--output_dir={output}", f"--steps={steps}", "--batch_size=32", "--num_workers=0",
        f"--log_freq={max(steps // 4, 1)}", "--env_eval_freq=0",
    )  # fmt: skip
    return output / "checkpoints" / "last" / "pretrained_model"


def evaluate(
    checkpoint: Path, output: Path, case: Case, episodes: int, steps: int
) -> tuple[dict[str, Any], list[Commands]]:
    """What `lerobot-eval` wrote, and the commands that the policy gave."""
    from lerobot.scripts.lerobot_eval import main

    with recorded() as batches:
        command(
            main, "lerobot-eval", f"--policy.path={checkpoint}", "--policy.device=cpu", "--env.type=pusht",
            f"--env.obs_type={ENVIRONMENT}", f"--env.episode_length={steps}", "--env.visualization_width=96",
            "--env.visualization_height=96", f"--eval.n_episodes={episodes}", f"--eval.batch_size={min(episodes, 10)}",
            "--eval.use_async_envs=false", f"--policy.async_mode={case.mode}", "--seed=1000",
            f"--policy.inference_overlap_steps={case.overlap}", f"--policy.action_quant_ratio={case.ratio}",
            f"--output_dir={output}",
        )  # fmt: skip
    return json.loads((output / "eval_info.json").read_text()), [batch for batch in batches if batch.actions]


@contextmanager
def recorded() -> Iterator[list[Commands]]:
    """Keeps what policies send meanwhile, which `lerobot-eval` does not write down."""
    from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy

    batches: list[Commands] = []
    reset, select = VLASHPolicy.reset, VLASHPolicy.select_action

    def begin(policy: VLASHPolicy) -> None:
        reset(policy)
        batches.append(Commands())

    def keep(policy: VLASHPolicy, batch: dict[str, Any]) -> torch.Tensor:
        action = select(policy, batch)
        batches[-1].actions.append(action.clone())
        batches[-1].chunks.append(policy.manager.counts.chunks)
        return action

    with patch.object(VLASHPolicy, "reset", begin), patch.object(VLASHPolicy, "select_action", keep):
        yield batches


@dataclass(frozen=True)
class Outcome:
    """Of one case.

    Attributes:
        rewards: the largest of each episode; 1 is 95 % of the goal covered.
        success: share of episodes.
        jump: mean distance between the commands at a chunk's boundary, in the board's units, whose side is 512.
        jerk: of the commands.
    """

    rewards: list[float]
    success: float
    jump: float
    jerk: float


def outcome(info: dict[str, Any], batches: Sequence[Commands]) -> Outcome:
    """In short."""
    episodes = [episode for task in info["per_task"] for episode in _episodes(task)]
    jumps, jerks = [], []
    for batch in batches:
        actions = torch.stack(batch.actions)
        jumps.append(boundary_jump(actions, batch.boundaries) or math.nan)
        jerks.append(jerk(actions, FPS) or math.nan)
    rewards = [reward for reward, _ in episodes]
    return Outcome(
        rewards, float(np.mean([done for _, done in episodes])), float(np.mean(jumps)), float(np.mean(jerks))
    )


def _episodes(task: dict[str, Any]) -> list[tuple[float, bool]]:
    metrics = task["metrics"]
    return list(zip(metrics["max_rewards"], metrics["successes"], strict=True))


def results(found: dict[Case, Outcome], expert_rewards: Sequence[float]) -> list[dict[str, Any]]:
    """For `harness.write`: each case against sync, and VLASH's commands against naive ones."""
    from harness import median, row

    rows = []
    for case, ours in found.items():
        sync, naive = found[Case("sync", 0, case.ratio)], found.get(Case("naive", case.overlap, case.ratio))
        shape = f"{len(ours.rewards)} episodes, K={STEPS} d={case.overlap} q={case.ratio}"
        mean = float(np.mean(ours.rewards))
        note = f"mean {mean:.3f}, success {ours.success:.0%}; the expert's mean {float(np.mean(expert_rewards)):.3f}"
        rows.append(
            row(f"largest reward, {case.mode}", "sync", shape, median(ours.rewards), median(sync.rewards),
                unit="reward", higher_is_better=True, note=note)
        )  # fmt: skip
        if naive is not None and case.mode == "vlash":
            for name, unit in (("jump", "board/512"), ("jerk", "board/512/s³")):
                rows.append(
                    row(f"{name} of commands, {case.mode}", "naive", shape, median([getattr(ours, name)]),
                        median([getattr(naive, name)]), unit=unit, note="jump: where a chunk ends and the next begins")
                )  # fmt: skip
    return rows


def draw(found: dict[Case, Outcome]) -> None:
    """Rewards and jumps over the overlap."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, label, value in (
        (axes[0], "largest reward, mean of episodes", lambda each: np.mean(each.rewards)),
        (axes[1], "jump between chunks, of 512", lambda each: each.jump),
    ):
        axis.axhline(value(found[Case("sync")]), color="C0", label="sync")
        for number, mode in enumerate(("naive", "vlash"), 1):
            over = [(case.overlap, value(each)) for case, each in found.items() if (case.mode, case.ratio) == (mode, 1)]
            axis.plot(*zip(*sorted(over), strict=True), f"C{number}o-", label=mode)
        axis.set(xlabel="overlap, commands", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("gym-pusht through lerobot-train and lerobot-eval: a small ACT, trained for minutes")
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


def shown(root: Path, episodes: int, steps: int) -> list[float]:
    """The expert's largest rewards; its data set is in `data`."""
    path = root / "expert.json"
    if not path.exists():
        path.write_text(json.dumps(make_dataset(root / "data", episodes, steps)))
    return json.loads(path.read_text())


def trained(root: Path, training: str, steps: int) -> Path:
    """The folder of a checkpoint."""
    checkpoint = root / training / "checkpoints" / "last" / "pretrained_model"
    return checkpoint if checkpoint.exists() else train(root / "data", root / training, training, steps)


def main() -> None:
    """Make data, train, evaluate, write the results, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-steps", type=int, default=1200)
    parser.add_argument("--shown", type=int, default=60, help="demonstrations")
    parser.add_argument("--episodes", type=int, default=20, help="of each evaluation")
    parser.add_argument("--length", type=int, default=150, help="steps of an episode")
    parser.add_argument("--folder", type=Path, help="for data and checkpoints, which are taken from there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = asked.folder or Path(folder)
        rewards = shown(root, asked.shown, asked.length)
        checkpoints = {name: trained(root, name, asked.train_steps) for name in TRAININGS}
        for number, case in enumerate(CASES):
            output = Path(folder) / f"evaluation-{number}"
            found[case] = outcome(*evaluate(checkpoints[case.training], output, case, asked.episodes, asked.length))
            print(case, found[case], flush=True)
    from harness import write

    write("vlash_pusht", results(found, rewards))
    draw(found)


if __name__ == "__main__":
    main()
