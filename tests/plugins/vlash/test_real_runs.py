"""The benchmarks that run robots: small, and Meta-World's arm replaced by one of three lines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import SYNC, VLASH

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


class Arm:
    """A hand that goes a quarter of the way to its setpoint in a step, and is to come near a place."""

    NEAR = 0.02

    def reset(self, seed):
        self.hand = self.setpoint = np.zeros(3)
        self.place = np.random.default_rng(seed).uniform(-0.15, 0.15, 3)
        return self.seen()

    def step(self, action):
        self.setpoint = self.setpoint + 0.01 * np.clip(action[:3], -1, 1)
        self.hand = self.hand + 0.25 * (self.setpoint - self.hand)
        return self.seen(), bool(np.linalg.norm(self.place - self.hand) < self.NEAR)

    def expert(self):
        return np.append(np.clip(10 * (self.place - self.hand), -1, 1), 0.0)

    def future(self, actions):
        kept = self.hand, self.setpoint
        for action in actions:
            self.step(action)
        after = self.seen()[1]
        self.hand, self.setpoint = kept
        return after

    def seen(self):
        return np.append(self.place, np.zeros(28)), np.concatenate([self.hand, self.setpoint, [1.0]])


@pytest.fixture
def realtime(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vlash_realtime

    return vlash_realtime


@pytest.fixture
def metaworld(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vlash_metaworld

    return vlash_metaworld


def test_sync_stands_still_and_vlash_does_not(realtime, monkeypatch):
    monkeypatch.setattr(realtime, "MOMENTS", 20)
    case = realtime.Case(8, 4)
    sync, vlash = (realtime.run(case, mode, seconds=0.7, latency=0.04) for mode in (SYNC, VLASH))
    assert vlash.stalls == 0
    assert sync.stalls == 2, "21 commands are three chunks of 8"
    assert sync.record.stall_seconds >= 0.12
    assert min(sync.reactions + vlash.reactions) >= 0
    rows = realtime.results(case, vlash, sync)
    json.dumps(rows)
    stalls = rows[0]
    assert (stalls["ours"]["p50"], stalls["theirs"]["p50"], stalls["ratio"]) == (0, 2, None)
    formula = next(row for row in rows if row["what"].startswith("reaction by the paper"))
    assert formula["ratio"] == pytest.approx((0.1 + 8 / 30) / 0.1)


def test_the_planner_looks_ahead_by_the_delay_it_is_told(realtime):
    planner = realtime.Planner(0.0, ratio=1)
    turn = 2 * torch.pi / (realtime.ROUND * realtime.FPS)
    state = torch.tensor([0.3, -0.2])
    late = planner(ChunkRequest(Observation(0.5, state), state, delay=3))
    fresh = planner(ChunkRequest(Observation(0.5 + 3 * turn, state), state))
    torch.testing.assert_close(late, fresh)
    assert late.shape == (realtime.CHUNK, 2)


def test_the_target_jumps_and_goes_round(realtime):
    target = realtime.Target(2.0, seed=0)
    assert target.angle(10 + realtime.ROUND) - target.angle(10) == pytest.approx(2 * np.pi)
    moves = np.diff([target.angle(moment) for moment in np.linspace(0, 2, 2001)])
    assert (np.abs(moves) > 0.01).sum() == 4


def test_windows_repeat_the_end_and_mark_it(metaworld):
    from metaworld_scenes import Demonstration

    ramp = torch.arange(5.0)[:, None]
    shown = Demonstration(ramp.expand(-1, 31), ramp.expand(-1, 7), ramp.expand(-1, 4))
    seen, states, actions, is_pad = metaworld.windows([shown], 2)
    assert actions.shape == (5, metaworld.CHUNK + 2, 4)
    assert actions[3, :3, 0].tolist() == [3, 4, 4]
    assert is_pad[3, :3].tolist() == [False, False, True]
    assert states[:, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4], [4, 4, 4]]
    assert seen.shape == (5, 31)


def test_the_model_of_the_hand_knows_its_lag(metaworld):
    from metaworld_scenes import HandModel, demonstrations

    shown = demonstrations(Arm(), range(8))
    model = HandModel(shown, 4)
    for steps in (1, 4):
        errors = {name: np.mean(found) for name, found in model.errors(shown, steps).items()}
        assert errors["model"] < errors["sum"] < errors["measured"]
    arm = Arm()
    state = torch.from_numpy(arm.reset(0)[1]).float()
    pending = torch.full((1, 4), 0.5)
    torch.testing.assert_close(model(state, pending), torch.from_numpy(arm.future(pending.numpy())).float())
    assert torch.equal(model(state, pending[:0]), state)


def test_a_scene_is_shown_trained_and_swept(metaworld, tmp_path, monkeypatch):
    monkeypatch.setattr(metaworld, "WIDTH", 32)
    monkeypatch.setattr(Arm, "NEAR", 0.1)
    task = metaworld.MetaworldTask("arm", Arm, train_steps=60, shown=26, evaluated=2, folder=tmp_path)
    rows = metaworld.swept(task, tmp_path / "rows.json", delays=(0, 2))
    assert {row.mode for row in rows} == set(task.modes)
    assert len(rows) == 2 * len(task.modes)
    found = {(row.mode, row.delay): row for row in rows}
    assert found["rtc", 0].steps == found["sync", 0].steps, "without a delay there is nothing to tell them apart"
    assert found["vlash", 2].stalls == 1 < found["sync", 2].stalls
    assert found["vlash", 2].reaction_paper < found["sync", 2].reaction_paper
    compared = metaworld.results(task, rows)
    assert found["sync", 0].success > 0
    assert {row["what"].split(", ")[0] for row in compared} > {"arm: success", "arm: boundary jump", "arm: time"}
    json.dumps(compared)
    again = metaworld.MetaworldTask("arm", Arm, train_steps=60, shown=26, evaluated=2, folder=tmp_path)
    assert metaworld.swept(again, tmp_path / "rows.json", delays=(0, 2)) == rows


def test_the_true_future_is_what_comes(metaworld):
    from metaworld_scenes import Robots

    robots = Robots(Arm, 2, 0)
    state = robots.reset(0).state
    pending = torch.full((2, 3, 4), -0.7)
    expected = robots.future(state, pending)
    for action in pending.unbind(1):
        seen = robots.step(action)
    torch.testing.assert_close(seen.state, expected)


def test_a_delay_beyond_a_chunk_is_refused(metaworld):
    task = metaworld.MetaworldTask("arm", Arm, train_steps=1, shown=22, evaluated=1)
    with pytest.raises(ValueError, match="delay: got 5"):
        task.method("sync q=2", 5, 0, task.environment())
