"""The benchmarks that need LeRobot's environment, in small: Meta-World, and gym-pusht by LeRobot's programs."""

import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


@pytest.fixture
def scenes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import metaworld_scenes

    return metaworld_scenes


@pytest.fixture
def pusht(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vlash_pusht

    return vlash_pusht


def test_a_scene_begins_alike_with_a_seed_and_its_button_glides(scenes):
    arena = scenes.SCENES["gliding-button"].arena()
    (seen, state), (other, _), (again, _) = (arena.reset(seed) for seed in (3, 4, 3))
    assert np.array_equal(seen, again)
    assert not np.array_equal(seen, other)
    assert (seen.shape, state.shape) == ((31,), (7,))
    places = [arena.step(np.zeros(4))[0][0][0] for _ in range(150)]
    moves = np.abs(np.diff(places))
    assert np.median(moves) == pytest.approx(0.003)
    assert np.abs(places).max() <= scenes.EDGE + 1e-6
    assert (np.diff(np.sign(np.diff(places))) != 0).any(), "it turns round"


def test_the_future_is_looked_into_and_left_as_it_was(scenes):
    arena = scenes.SCENES["gliding-button"].arena()
    arena.reset(5)
    for _ in range(20):
        arena.step(arena.expert())
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32)
    expected = arena.future(actions)
    for action in actions:
        (_, state), _ = arena.step(action)
    np.testing.assert_allclose(state, expected, atol=1e-9)


def test_the_expert_shows_how(scenes):
    shown = scenes.demonstrations(scenes.SCENES["button"].arena(), [0, 1], noise=0.2)
    assert len(shown) == 2
    for each in shown:
        assert len(each.seen) == len(each.states) == len(each.actions) < scenes.HORIZON
        assert each.actions.abs().max() <= 1


def test_pusht_is_shown_trained_and_evaluated_by_lerobots_programs(pusht, tmp_path):
    rewards = pusht.make_dataset(tmp_path / "data", 2, 12)
    assert len(rewards) == 2
    checkpoint = pusht.train(tmp_path / "data", tmp_path / "out", pusht.TOLD, 1)
    found = {}
    for case in (pusht.Case("sync"), pusht.Case("naive", 4), pusht.Case("vlash", 4)):
        info, batches = pusht.evaluate(checkpoint, tmp_path / f"{case.mode}-{case.overlap}", case, 1, 20)
        (batch,) = batches
        assert batch.boundaries == [8, 16]
        assert len(batch.actions) == 20
        found[case] = pusht.outcome(info, batches)
        assert found[case].jump > 0
    json.dumps(pusht.results(found, rewards))
