"""The toy: its world, its expert, its policy, and what a delay does to them."""

import math
from functools import partial

import pytest
import torch

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.runner import AsyncRunner
from pronghorn.vlash.sweep import Method, rollout
from pronghorn.vlash.tracking import (
    CHUNK,
    HIT,
    MAX_DELAY_STEPS,
    REACH,
    SPEED,
    ExpertPolicy,
    FlowPolicy,
    TrackingEnvironment,
    TrackingTask,
    demonstrations,
    expert_action,
    moved,
    train,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    return train(max_delay_steps=0, steps=200, batch=128).requires_grad_(False)


def settings(mode, delay, **more):
    return VLASHSettings(
        async_mode=mode, chunk_size=CHUNK, n_action_steps=max(delay, 1),
        inference_overlap_steps=0 if mode == "sync" else delay, state_estimator="sum_delta",
        action_low=[-REACH] * 2, action_high=[REACH] * 2, **more,
    )  # fmt: skip


def drive(environment, method, seed=0):
    """Every command, [steps, count, 2]."""
    observation, actions = environment.reset(seed), []
    with AsyncRunner(method.policy, method.settings, method.estimator, threaded=False) as runner:
        for _ in range(environment.horizon):
            actions.append(runner.step(observation))
            observation = environment.step(actions[-1])
    return torch.stack(actions)


def test_targets_bounce():
    place, step = moved(torch.tensor([[0.99, 0.0], [-0.97, 0.98]]), torch.tensor([[0.05, 0.03], [-0.04, 0.04]]))
    torch.testing.assert_close(place, torch.tensor([[0.96, 0.03], [-0.99, 0.98]]))
    torch.testing.assert_close(step, torch.tensor([[-0.05, 0.03], [0.04, -0.04]]))


def test_targets_do_not_depend_on_actions():
    environment = TrackingEnvironment(6, horizon=30)
    seen = []
    for action in (torch.zeros(6, 2), torch.ones(6, 2)):
        environment.reset(3)
        seen.append(torch.stack([environment.step(action).content for _ in range(30)]))
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0][..., 2:].norm(dim=-1), torch.full((30, 6), 10 * SPEED))
    assert seen[0][..., :2].abs().max() <= 1
    assert not torch.equal(environment.reset(3).content, environment.reset(4).content)


def test_how_often_targets_turn():
    environment = TrackingEnvironment(512, horizon=100)
    environment.reset(0)
    # What a bounce does not change.
    steps = torch.stack([environment.step(torch.zeros(512, 2)).content[:, 2:].abs() for _ in range(100)])
    turns = ((steps[1:] - steps[:-1]).norm(dim=-1) > 1e-4).float().mean().item()
    assert turns == pytest.approx(0.03, abs=0.003)


def test_robots_move_as_told_up_to_their_reach():
    environment = TrackingEnvironment(512, noise=0.01)
    before = environment.reset(0).state
    moves = environment.step(torch.tensor([0.05, -9.0]).expand(512, 2)).state - before
    torch.testing.assert_close(moves.mean(0), torch.tensor([0.05, -REACH]), atol=2e-3, rtol=0)
    torch.testing.assert_close(moves.std(0), torch.tensor([0.01, 0.01]), atol=1e-3, rtol=0)


def test_the_future_is_the_future():
    environment = TrackingEnvironment(8)
    environment.reset(1)
    environment.step(torch.zeros(8, 2))
    pending = 0.1 * torch.randn(8, 3, 2)
    expected = environment.future(environment.robot, pending)
    for number in range(3):
        environment.step(pending[:, number])
    torch.testing.assert_close(environment.robot, expected)


def test_success_counts_hits_after_the_start():
    environment = TrackingEnvironment(2, horizon=60, noise=0.0)
    observation = environment.reset(0)
    hits = torch.zeros(2)
    for number in range(60):
        assert not environment.finished.any()
        still = torch.tensor([[1.0], [0.0]])
        observation = environment.step(still * expert_action(observation.content, observation.state))
        hits += (environment.distance < HIT) * (number >= 50)
    assert environment.finished.all()
    assert torch.equal(environment.success(), hits / 10)
    assert environment.success()[0] >= 0.8
    environment.reset(1)
    assert not environment.finished.any()
    assert environment.success().tolist() == [0, 0]


def test_the_expert_plans_what_it_would_do():
    """Where nothing is random, its plan is what it does when it sees every step."""
    environment = TrackingEnvironment(64, horizon=80, turn=0.0, noise=0.0)
    watched = drive(environment, Method(settings("sync", 1), ExpertPolicy(told_delay=False)))
    planned = drive(environment, Method(settings("sync", 4), ExpertPolicy(told_delay=False)))
    torch.testing.assert_close(planned, watched, atol=1e-5, rtol=0)


@pytest.mark.parametrize("delay", range(1, MAX_DELAY_STEPS + 1))
@pytest.mark.parametrize("truth", [False, True])
def test_vlash_undoes_a_delay_where_nothing_is_random(delay, truth):
    environment = TrackingEnvironment(64, horizon=80, turn=0.0, noise=0.0)
    without = drive(environment, Method(settings("sync", 1), ExpertPolicy(told_delay=True)))
    policy, estimator = ExpertPolicy(told_delay=True), environment.future if truth else None
    with_delay = drive(environment, Method(settings("vlash", delay), policy, estimator))
    torch.testing.assert_close(with_delay, without, atol=1e-5, rtol=0)
    assert environment.success().mean() > 0.99
    measured = settings("vlash", delay)
    measured.state_estimator = "measured"
    not_moved = drive(environment, Method(measured, ExpertPolicy(told_delay=True)))
    assert (not_moved - without).abs().max() > 0.1


def test_a_target_does_not_wait():
    """What a robot that stands still while it computes loses, and one that does not keeps."""
    environment = TrackingEnvironment(128)
    found = [
        rollout(
            environment,
            Method(settings(mode, 3), ExpertPolicy(told_delay=mode == "vlash"), world_waits=waits),
            "",
            3,
            0,
        )
        for mode, waits in (("sync", True), ("vlash", False), ("sync", False))
    ]
    assert found[0].success > found[1].success > 0.8
    assert found[2].success < 0.4
    assert found[2].seconds < found[0].seconds


def test_noise_is_what_the_estimate_misses():
    """With the true future nothing is lost to noise in the state that a plan begins from."""
    environment = TrackingEnvironment(256, turn=0.0, noise=0.03)
    estimate, truth = (
        rollout(environment, Method(settings("vlash", 4), ExpertPolicy(told_delay=True), estimator), "vlash", 4, 0)
        for estimator in (None, environment.future)
    )
    assert truth.success > estimate.success + 0.02


def test_a_measured_state_is_no_estimate():
    environment = TrackingEnvironment(256)
    found = [
        rollout(environment, Method(settings(mode, 3), ExpertPolicy(told_delay=told)), mode, 3, 0).success
        for mode, told in (("vlash", True), ("vlash", False), ("naive", False))
    ]
    assert found[0] > 0.8
    assert max(found[1:]) < 0.3


def request(state, delay=0, leftover=None):
    return ChunkRequest(Observation(torch.rand(len(state), 4), state), state, delay, leftover)


def test_demonstrations():
    """Each robot's actions are the expert's from its delay on, and end where its state was."""
    environment = TrackingEnvironment(256, horizon=MAX_DELAY_STEPS + CHUNK, turn=0.0, noise=0.0)
    torch.manual_seed(0)
    actions, seen, state, delay = demonstrations(environment, 5, MAX_DELAY_STEPS)
    assert delay.unique().tolist() == list(range(MAX_DELAY_STEPS + 1))
    first = environment.reset(5)
    assert torch.equal(seen, first.content)
    for steps in range(MAX_DELAY_STEPS + 1):
        of = delay == steps
        told = ChunkRequest(Observation(seen[of], state[of]), state[of], steps)
        torch.testing.assert_close(actions[of], ExpertPolicy(told_delay=True)(told), atol=1e-5, rtol=0)
    moved_on = (state - first.state).norm(dim=-1)
    assert (moved_on[delay == 0] == 0).all()
    assert moved_on[delay == 4].mean() > moved_on[delay == 1].mean() > 0.05


def test_the_delay_does_nothing_before_training():
    policy = FlowPolicy(delay_conditioning=True)
    state = torch.rand(7, 2)
    asked = request(state)
    later = ChunkRequest(asked.observation, state, 3)
    chunks = [policy.sample(each, torch.Generator().manual_seed(0)) for each in (asked, later)]
    assert torch.equal(*chunks)
    assert chunks[0].shape == (7, CHUNK, 2)
    policy.loss(torch.rand(7, CHUNK, 2), asked.observation.content, state, torch.full((7,), 3)).backward()
    assert policy.delay.weight.grad[3].abs().sum() > 0
    assert policy.delay.weight.grad[[0, 1, 2, 4]].abs().sum() == 0


@pytest.mark.parametrize("full", [False, True])
def test_guided_chunks_begin_like_what_runs(trained, full):
    asked = request(torch.rand(64, 2), 2, leftover=REACH * torch.rand(64, CHUNK - 2, 2))

    def off(**how):
        chunk = trained.sample(asked, torch.Generator().manual_seed(0), **how)
        assert not how or not chunk.requires_grad
        return (chunk[:, :2] - asked.leftover[:, :2]).norm(dim=-1).mean().item()

    assert off(guided=True, full_jacobian=full) < 0.5 * off()


def test_training_learns(trained):
    torch.manual_seed(0)
    batch = demonstrations(TrackingEnvironment(256, horizon=CHUNK), 0, 0)
    losses = []
    for policy in (FlowPolicy(), trained):
        torch.manual_seed(1)
        with torch.no_grad():
            losses.append(policy.loss(*batch).item())
    assert losses[1] < 0.6 * losses[0]
    environment = TrackingEnvironment(128)
    distances = []
    for policy in (FlowPolicy(), trained):
        sample = partial(policy.sample, generator=torch.Generator().manual_seed(0))
        drive(environment, Method(settings("sync", 1), sample))
        distances.append(environment.distance.mean().item())
    assert distances[1] < 0.3 < distances[0]


def test_training_is_repeatable():
    state = [train(steps=2, batch=8, seed=seed).state_dict()["entry.weight"] for seed in (1, 1, 2)]
    assert torch.equal(state[0], state[1])
    assert not torch.equal(state[0], state[2])


def test_task_policies_are_kept(tmp_path):
    task = TrackingTask(train_steps=1, environments=4, folder=tmp_path / "new")
    told = task.policy("told", 0)
    assert task.policy("told", 0) is told
    assert told.delay is not None
    again = TrackingTask(train_steps=1, folder=tmp_path / "new").policy("told", 0)
    for name, value in told.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["tracking-told-1-0.safetensors"]


@pytest.mark.parametrize("mode", TrackingTask.modes)
def test_modes_are_what_they_are_called(mode):
    task = TrackingTask(train_steps=1, environments=4)
    environment = task.environment()
    environment.reset(0)
    method = task.method(mode, 3, 0, environment)
    assert method.settings.async_mode == mode.removesuffix("_real_time").partition("+")[0].replace(
        "roll_forward", "vlash"
    ).replace("expert", "vlash")
    assert method.settings.n_action_steps == 3
    assert method.settings.delay_conditioning == (mode == "vlash+delay")
    assert (method.estimator is not None) == (mode == "vlash+truth")
    calls = []

    def policy(asked):
        calls.append(asked)
        return method.policy(asked)

    row = rollout(environment, Method(method.settings, policy, method.estimator), mode, 3, 0)
    delays = {asked.delay for asked in calls[1:]}
    assert delays == ({0} if mode.startswith("sync") else {3})
    assert row.n_action_steps == 3
    assert math.isfinite(row.jerk)


@pytest.mark.parametrize("delay", [-1, 5])
def test_delays_beyond_training(delay):
    task = TrackingTask()
    with pytest.raises(ValueError, match=f"delay: got {delay}, wanted 0 to 4"):
        task.method("vlash", delay, 0, task.environment())
