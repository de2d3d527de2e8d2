"""Rows of a sweep, against what happened in a world where everything is known beforehand."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from tests.plugins.vlash.stubs import CountingPolicy

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.metrics import reaction_latencies
from pronghorn.vlash.sweep import Method, SweepRow, draw, over_delays, read_rows, rollout, sweep, write_rows
from pronghorn.vlash.tracking import TrackingTask

FPS = 10.0


class Countdown:
    """Two episodes, the second of them shorter; the state is the number of the command."""

    def __init__(self, lengths=(12, 7), horizon=12):
        self.lengths, self.horizon = torch.tensor(lengths), horizon

    def reset(self, seed):
        self.time, self.commands = 0, []
        self.finished = self.lengths <= 0
        return self._observation()

    def step(self, action):
        self.time += 1
        self.commands.append(action)
        self.finished = self.lengths <= self.time
        return self._observation()

    def success(self):
        return (self.lengths <= self.time).float() / 2

    def _observation(self):
        return Observation(self.time, torch.full((2, 1), float(self.time)))


def settings(mode="vlash", delay=2, **more):
    overlap = 0 if mode == "sync" else delay
    return VLASHSettings(
        **{"async_mode": mode, "chunk_size": 8, "n_action_steps": 4, "inference_overlap_steps": overlap, "fps": FPS}
        | more
    )


class CountdownTask:
    name, modes = "countdown", ("sync", "vlash")

    def __init__(self, size=1):
        self.size, self.asked = size, []

    def about(self):
        return {"size": self.size}

    def environment(self):
        return Countdown()

    def method(self, mode, delay, seed, environment):
        self.asked.append((mode, delay, seed))
        return Method(settings(mode, delay), CountingPolicy(8, batch=(2,)))


def test_an_asynchronous_row():
    environment = Countdown()
    row = rollout(environment, Method(settings(), CountingPolicy(8, batch=(2,))), "vlash", 2, 5)
    assert (row.mode, row.delay, row.seed, row.episodes, row.n_action_steps) == ("vlash", 2, 5, 2, 4)
    assert len(environment.commands) == 12
    assert row.steps == (12 + 7) / 2
    assert row.success == 0.5
    # One wait, for the first chunk, of two control periods.
    assert row.stalls == 1
    assert row.stall_seconds == pytest.approx(0.2)
    assert row.seconds == pytest.approx(9.5 / FPS + 0.2)
    # Chunks of 100, 101, 102, 103, then of 200 ...; the second episode ends within the second chunk.
    assert row.boundary_jump == 97
    assert row.typical_step == 1
    # Third differences of 100 101 102 103 | 200 ...: 96, -192, 96 around each boundary.
    squares = {12: 2 * (96**2 + 192**2 + 96**2) / 9, 7: (96**2 + 192**2 + 96**2) / 4}
    assert row.jerk == pytest.approx(FPS**3 * sum(value**0.5 for value in squares.values()) / 2)


def test_a_synchronous_row():
    row = rollout(Countdown(), Method(settings("sync"), CountingPolicy(8, batch=(2,))), "sync", 2, 0)
    # The longer episode waits for three chunks, the shorter for two.
    assert row.stalls == 2.5
    assert row.stall_seconds == pytest.approx(0.5)
    assert row.seconds == pytest.approx(9.5 / FPS + 0.5)


@pytest.mark.parametrize(("estimator", "held"), [("last_action", [103, 203]), ("sum_delta", [0, 0])])
def test_a_world_that_does_not_wait(estimator, held):
    """Between chunks of four the robot holds for two periods, and the episode has no more periods for that."""
    environment = Countdown((14, 14), 14)
    method = Method(settings("sync", state_estimator=estimator), CountingPolicy(8, batch=(2,)), world_waits=False)
    row = rollout(environment, method, "sync", 2, 0)
    chunk = [0, 1, 2, 3]
    wanted = [*(100 + j for j in chunk), *held[:1] * 2, *(200 + j for j in chunk), *held[1:] * 2, 300, 301]
    assert [command[0].item() for command in environment.commands] == wanted
    assert (row.steps, row.stalls) == (10, 3)
    # The first chunk is waited for before the episode begins.
    assert row.seconds == pytest.approx((14 + 2) / FPS)
    assert row.boundary_jump == 97


def test_an_episode_that_ends_while_the_robot_holds():
    environment = Countdown((5, 5), 5)
    method = Method(settings("sync"), CountingPolicy(8, batch=(2,)), world_waits=False)
    row = rollout(environment, method, "sync", 2, 0)
    assert len(environment.commands) == 5
    assert (row.steps, row.boundary_jump) == (4, None)


def test_changes_are_summed_to_goals():
    """Changes of 0, 1, 4, 9 … are goals whose third differences are 2, which of the changes themselves are 0."""

    def policy(request):
        return (torch.arange(8.0) ** 2)[:, None].expand(2, 8, 1)

    changes = settings("sync", 0, n_action_steps=8, state_estimator="sum_delta")
    row = rollout(Countdown((8, 8), 8), Method(changes, policy), "sync", 0, 0)
    assert row.jerk == pytest.approx(FPS**3 * 2)
    goals = settings("sync", 0, n_action_steps=8)
    assert rollout(Countdown((8, 8), 8), Method(goals, policy), "sync", 0, 0).jerk == 0
    assert row.boundary_jump is None
    assert rollout(Countdown((2, 2)), Method(changes, policy), "sync", 0, 0).jerk is None


def test_merged_actions():
    """With q = 2 a chunk of 4 is two commands, and 12 commands are six chunks."""
    environment = Countdown()
    method = Method(settings("vlash", 1, action_quant_ratio=2), CountingPolicy(8, batch=(2,)))
    row = rollout(environment, method, "vlash", 1, 0)
    assert [command[0].item() for command in environment.commands[:5]] == [101, 103, 201, 203, 301]
    assert row.boundary_jump == 98
    assert row.typical_step == 2
    assert row.reaction_worst == pytest.approx((1 + 2) / FPS)
    assert row.reaction_paper == pytest.approx(0.1)


@pytest.mark.parametrize(("mode", "delay"), [("vlash", 1), ("vlash", 4), ("naive", 2), ("sync", 3), ("sync", 0)])
def test_expected_reactions(mode, delay):
    """Against events all along a run, and the first command of each that knows of it."""
    row = rollout(Countdown(), Method(settings(mode, delay), CountingPolicy(8, batch=(2,))), mode, delay, 0)
    cycle = 4 + (delay if mode == "sync" else 0)
    # From the first chunk that was asked for ahead on: chunk c is used at c * cycle, seen `delay` before.
    commands = [c * cycle + step for c in range(50) for step in range(4)]
    observed = [c * cycle - delay for c in range(50) for _ in range(4)]
    events = [100 + (number + 0.5) / 64 for number in range(64 * cycle)]
    found = reaction_latencies(events, commands, observed)
    assert len(found) == len(events)
    assert row.reaction_mean * FPS == pytest.approx(sum(found) / len(found))
    assert row.reaction_worst * FPS == pytest.approx(max(found), abs=1 / 64)
    assert row.reaction_paper * FPS == pytest.approx(delay + (4 if mode == "sync" else 0))


class Paying(Countdown):
    def rewards(self):
        return torch.tensor([3.0, 1.0]), torch.tensor([5.0, 4.0])


def test_rewards_of_those_that_pay_some():
    method = Method(settings(), CountingPolicy(8, batch=(2,)))
    row = rollout(Paying(), method, "vlash", 2, 0)
    assert (row.reward_largest, row.reward_sum) == (2, 4.5)
    assert SweepRow(**row.to_dict()) == row
    row = rollout(Countdown(), method, "vlash", 2, 0)
    assert row.reward_largest is row.reward_sum is None
    assert "reward_sum" not in row.to_dict(), "files are those of before there were rewards"


def test_every_case_once():
    task = CountdownTask()
    rows = list(sweep(task, ["vlash", "sync"], [0, 2], [0, 1]))
    assert [row.key for row in rows] == [(mode, d, s) for mode in ("vlash", "sync") for d in (0, 2) for s in (0, 1)]
    assert task.asked == [row.key for row in rows]
    assert over_delays(rows, "sync", "stalls") == {0: [2.5, 2.5], 2: [2.5, 2.5]}


def test_what_is_done_is_not_done_again(tmp_path):
    task = CountdownTask()
    first = list(sweep(task, ["vlash"], [0, 2], [0]))
    write_rows(tmp_path / "rows.json", task, first)
    task.asked.clear()
    again = list(sweep(task, ["vlash", "sync"], [0, 2], [0], read_rows(tmp_path / "rows.json", task)))
    assert again[:2] == first
    assert task.asked == [("sync", 0, 0), ("sync", 2, 0)]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [row.to_dict() for row in first]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_rows_of_something_else(tmp_path):
    path = tmp_path / "rows.json"
    assert read_rows(path, CountdownTask()) == []
    write_rows(path, CountdownTask(2), [])
    with pytest.raises(ValueError, match=r"holds a sweep of countdown with \{'size': 2\}"):
        read_rows(path, CountdownTask())
    for content in ("{", "[]", '{"rows": [{"mode": 1}]}', '{"rows": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="wanted what a sweep wrote"):
            read_rows(path, CountdownTask())


@pytest.mark.parametrize(
    ("modes", "delays", "seeds", "said"),
    [
        ([], [0], [0], "modes: got none"),
        (["vlash"], [], [0], "delays: got none"),
        (["vlash"], [0], [], "seeds: got none"),
        (["vlash", "rtc"], [0], [0], "modes: got rtc, accepted for countdown are sync, vlash"),
    ],
)
def test_nothing_to_do(modes, delays, seeds, said):
    with pytest.raises(ValueError, match=said):
        next(sweep(CountdownTask(), modes, delays, seeds))


def test_a_picture(tmp_path):
    import matplotlib.image

    row = SweepRow("vlash", 1, 0, 4, 1, 0.5, 10, 1, 0.1, 1, 0.1, 0.2, 0.1, 0.3, None, None)
    rows = [dataclasses.replace(row, mode=mode, delay=d, seed=s) for mode in "ab" for d in (2, 0) for s in (0, 1)]
    assert list(over_delays(rows, "a", "success")) == [0, 2]
    assert over_delays(rows, "a", "jerk") == {}
    draw(rows, tmp_path / "rows.png", "nothing")
    picture = matplotlib.image.imread(tmp_path / "rows.png")
    assert picture.shape[:2] == (600, 1200)
    assert picture[..., :3].std() > 0.05
    draw([dataclasses.replace(row, reward_largest=1, reward_sum=2) for row in rows], tmp_path / "rows.png", "more")
    assert matplotlib.image.imread(tmp_path / "rows.png").shape[:2] == (600, 1600)


def test_the_toy_through_the_sweep():
    """The expert's plan from the estimate: what a delay costs, and that the same seed gives the same rows."""
    once = partial(sweep, TrackingTask(environments=40), ["expert"], [0, 2, 4])
    rows = list(once([0]))
    success = [row.success for row in rows]
    assert success == sorted(success, reverse=True)
    assert success[0] > 0.97
    assert 0.6 < success[2] < 0.95
    assert [row.n_action_steps for row in rows] == [1, 2, 4]
    assert list(once([0])) == rows
    assert [row.success for row in once([1])] != success
