"""Groups that wait: what a sample becomes, when a group is whole, too old, or lost with its worker."""

import json
import math
import queue

import numpy as np
import pytest
import torch
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from pronghorn.trl.async_rollouts import GroupBuffer, Position, rollout_of
from pronghorn.trl.group_stream import GroupSource, RolloutError, StepLoader, shares_of


def sample(group=0, version=0, ids=(5, 6, 7, 8), mask=(0, 0, 1, 1), reward=1.0, advantage=0.5, **metrics):
    log_probs = [-1.0 if trained else 0.0 for trained in mask]
    return RolloutSample(
        "p", "c", np.array(ids), np.array(mask), np.array(log_probs, np.float32), advantage, version, group,
        {"reward": reward, **metrics},
    )  # fmt: skip


def rollout(group=0, version=0, **changes):
    return rollout_of(sample(group, **changes), version, version)


class Foreign:
    """A worker of someone else's: a queue, and no stamps."""

    def __init__(self, samples=()):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self.failure = RuntimeError("nothing comes any more")
        for one in samples:
            self.rollout_buffer.put(one)

    def check_health(self, stale_after_s):
        raise self.failure


class Paced(Foreign):
    """One that can be told how far it may go, and from where."""

    def __init__(self, samples=()):
        super().__init__(samples)
        self.allowed, self.position = [], None

    def allow(self, groups):
        self.allowed.append(groups)

    def go_on(self, position):
        self.position = position


def source(worker, max_age=1, groups_per_step=1, num_generations=2):
    metrics = {}

    class Metrics(dict):
        def __missing__(self, name):
            return self.setdefault(name, [])

    metrics = Metrics()
    found = GroupSource(worker, num_generations=num_generations, groups_per_step=groups_per_step, max_age=max_age,
                        metrics=metrics, stale_after_s=1.0)  # fmt: skip
    found.metrics = metrics
    return found


# A sample


def test_a_prompt_ends_where_the_first_token_is_trained():
    found = rollout_of(sample(3, ids=range(8), mask=(0, 0, 0, 1, 1, 0, 0, 1), reward=2.0), 5, 7)
    assert found.prompt_ids.tolist() == [0, 1, 2]
    assert found.completion_ids.tolist() == [3, 4, 5, 6, 7]
    assert found.sampled.tolist() == [True, True, False, False, True]  # the two between are a tool's
    assert found.sampler_log_probs.tolist() == [-1, -1, 0, 0, -1]
    assert (found.reward, found.advantage, found.group) == (2.0, 0.5, 3)
    assert (found.policy_version, found.policy_version_end) == (5, 7)


def test_samples_at_the_edge():
    nothing = rollout_of(sample(ids=(1, 2), mask=(0, 0)), 0, 0)
    assert (len(nothing.prompt_ids), len(nothing.completion_ids)) == (2, 0)
    all_of_it = rollout_of(sample(ids=(1, 2), mask=(1, 1)), 0, 0)
    assert all_of_it.prompt_ids.tolist() == [1]  # the first token of all has no probability


def test_samples_that_cannot_be():
    with pytest.raises(ValueError, match="got 3 input_ids, 4 of completion_mask and 4 old_log_probs"):
        rollout_of(sample(ids=(1, 2, 3)), 0, 0)
    bare = sample()
    bare.metrics = {"speed": 1.0}
    with pytest.raises(ValueError, match="got metrics speed, wanted reward among them"):
        rollout_of(bare, 0, 0)


# The place in the sequence of prompts


def test_position():
    position = Position()
    for group in (1, 3, 0, 4):
        position.add(group)
    assert position == Position(2, {3, 4})
    position.add(2)
    assert position == Position(5, set())


# The buffer


def test_a_group_is_whole_with_its_last_row_however_rows_are_mixed():
    buffer = GroupBuffer()
    assert [buffer.add(rollout(group), rows=2) for group in (0, 1, 1, 0)] == [False, False, True, True]
    assert [[member.group for member in group] for group in buffer.waiting] == [[1, 1], [0, 0]]
    assert buffer.position == Position(2)
    buffer.add(rollout(7), rows=2)
    with pytest.raises(ValueError, match="group 7: got 2 rows, and it said that it has 1"):
        buffer.add(rollout(7), rows=1)


@pytest.mark.fault(25)
def test_the_oldest_are_taken_first_and_the_too_old_are_dropped_whole():
    buffer = GroupBuffer()
    for group, versions in ((0, (3, 3)), (1, (1, 2)), (2, (0, 3)), (3, (1, 1))):
        for version in versions:
            buffer.add(rollout(group, version), rows=2)
    assert buffer.drop(oldest=1) == 1
    assert [group[0].group for group in buffer.take(2)] == [1, 3]
    assert [group[0].group for group in buffer.waiting] == [0]


@pytest.mark.fault(25)
def test_what_waits_survives_on_disk(tmp_path):
    buffer, path = GroupBuffer(), tmp_path / "waiting.safetensors"
    for row in range(4):
        ids = range(3 + row)
        mask = [0, 0] + [1] * (len(ids) - 2)
        buffer.add(rollout(row // 2, row, ids=ids, mask=mask, reward=math.nan if row == 1 else float(row)), rows=2)
    buffer.add(rollout(9), rows=2)  # never whole
    buffer.save(path)
    found = GroupBuffer()
    found.load(path)
    ours_theirs = zip(*([row for group in one.waiting for row in group] for one in (found, buffer)), strict=True)
    for ours, theirs in ours_theirs:
        for name, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(ours, name), value, rtol=0, atol=0)
            else:
                assert getattr(ours, name) == pytest.approx(value, nan_ok=True), name
    assert [len(group) for group in found.waiting] == [2, 2]


def test_an_empty_buffer_survives_too(tmp_path):
    GroupBuffer().save(tmp_path / "waiting.safetensors")
    found = GroupBuffer()
    found.load(tmp_path / "waiting.safetensors")
    assert found.waiting == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("groups", torch.zeros(1, dtype=torch.long), "version_ends, .* cannot be right"),
        ("completion_lengths", torch.tensor([3, -1]), "completion_lengths cannot be right"),
        ("prompt_ids", torch.tensor([-1, 2, 3, 4]), "prompt_ids cannot be right"),
        ("advantages", torch.full((2,), math.inf).double(), "advantages cannot be right"),
        ("rewards", torch.zeros(2), "wanted rewards, advantages"), ("extra", torch.zeros(2), "wanted rewards, "),
    ],
)  # fmt: skip
def test_damaged_files(name, value, message, tmp_path):
    from safetensors.torch import load_file, save_file

    buffer, path = GroupBuffer(), tmp_path / "waiting.safetensors"
    for _ in range(2):
        buffer.add(rollout(), rows=2)
    buffer.save(path)
    save_file({**load_file(path), name: value}, path)
    with pytest.raises(ValueError, match=message):
        buffer.load(path)


# The source


def test_rows_of_a_foreign_worker_are_groups_by_count():
    stream = source(Foreign([sample(0, 1), sample(1, 1), sample(0, 1), sample(1, 1)]))
    stream.published(1, 0)
    assert [member.group for member in stream.next_groups(0)[0]] == [0, 0]
    assert [member.group for member in stream.next_groups(1)[0]] == [1, 1]


def test_a_forked_conversation_is_more_rows_of_its_group():
    rows = [sample(0, 1, group_rows=3.0) for _ in range(3)]
    stream = source(Foreign(rows))
    stream.published(1, 0)
    assert len(stream.next_groups(0)[0]) == 3


@pytest.mark.fault(25)
def test_versions_are_updates_and_too_old_groups_are_dropped_and_counted():
    worker = Paced([*[sample(0, 3, model_version_end=4.0)] * 2, *[sample(1, 4)] * 2, *[sample(2, 4)] * 2])
    stream = source(worker, max_age=2)
    for version, updates in ((3, 0), (4, 2), (5, 4)):
        stream.published(version, updates)
    found = stream.next_groups(4)
    assert [member.group for member in found[0]] == [1, 1]
    assert (found[0][0].policy_version, found[0][0].policy_version_end) == (2, 2)
    assert (stream.dropped, stream.trained) == (1, 1)
    assert stream.metrics["sample/dropped_groups_total"] == [1.0]
    assert stream.metrics["sample/staleness_max"] == [2.0]
    # Three steps of a group may be outstanding, and one more, as one was dropped.
    assert worker.allowed == [3, 3, 3, 4]
    stream.published(6, 5)
    assert worker.allowed[-1] == 1 + 1 + 3


def test_the_versions_of_a_row_may_span_updates():
    stream = source(Foreign([sample(0, 1, model_version_end=2.0), sample(0, 2)]))
    stream.published(1, 0)
    stream.published(2, 1)
    assert [(row.policy_version, row.policy_version_end) for row in stream.next_groups(1)[0]] == [(0, 1), (1, 1)]


def test_a_version_that_nobody_told():
    stream = source(Foreign([sample(0, 9)]))
    stream.published(1, 0)
    with pytest.raises(ValueError, match="got model_version 9, which no update_model_version told; known are 1"):
        stream.next_groups(0)


@pytest.mark.fault(25)
def test_weights_from_before_the_run_are_too_old():
    stream = source(Foreign([*[sample(0, 1)] * 2, *[sample(1, 5)] * 2]))
    stream.published(5, 3)
    assert stream.next_groups(3)[0][0].group == 1
    assert stream.dropped == 1


@pytest.mark.fault(25)
def test_a_dead_worker_is_told_with_its_reason():
    worker = Foreign()
    worker.failure.__cause__ = ConnectionError("the server has gone")
    with pytest.raises(RolloutError, match="the rollout worker failed: ConnectionError: the server has gone"):
        source(worker).next_groups(0)


def test_metrics_of_samples_and_of_steps():
    rows = [sample(0, 1, reward=reward, speed=2.0) for reward in (1.0, 3.0, math.nan)]
    stream = source(Foreign(rows), num_generations=3)
    stream.published(1, 0)
    stream.next_groups(0)
    assert stream.metrics["reward"] == [2.0]
    assert stream.metrics["reward_std"] == [1.0]
    assert stream.metrics["speed"] == [2.0] * 3
    assert stream.wait_s > 0


def test_what_lies_in_the_queue_at_a_start_is_made_anew():
    worker = Paced([sample(0, 1)])
    stream = source(worker)
    stream.start(Position(4, {6}), trained=3, dropped=2)
    assert worker.rollout_buffer.empty()
    assert worker.position == Position(4, {6})
    stream.published(8, 3)
    assert worker.allowed == [3 + 2 + 2]


def test_a_worker_that_starts_over_gets_other_numbers(caplog):
    worker = Foreign()
    stream = source(worker)
    stream.start(Position(4, {6}), trained=5)
    assert "Foreign cannot go on where the run was: it starts over" in caplog.text
    stream.published(1, 5)
    for _ in range(2):
        worker.rollout_buffer.put(sample(0, 1))
    assert stream.next_groups(5)[0][0].group == 7


# Ranks


def test_shares_are_whole_groups_of_about_as_many_tokens():
    groups = [[rollout(number, ids=range(3 + size), mask=[0, 0, *[1] * (1 + size)])] * 2
              for number, size in enumerate((0, 9, 1, 2, 8, 3))]  # fmt: skip
    shares = shares_of(groups, 2)
    assert sorted(member.group for share in shares for member in share) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [len({member.group for member in share}) for share in shares] == [3, 3]
    tokens = [sum(map(len, share)) for share in shares]
    assert abs(tokens[0] - tokens[1]) <= 2
    assert all(len(share) == 2 for share in shares_of(groups, 6))
    (alone,) = shares_of(groups, 1)
    assert [member.group for member in alone] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_micro_batches_hold_a_step(micro_batches):
    stream = source(Foreign([sample(group, 1) for group in (0, 0, 1, 1, 2, 2, 3, 3)]), groups_per_step=2)
    stream.published(1, 0)
    steps = iter(StepLoader(stream, lambda: 0, micro_batches, ranks=1))
    for groups in ([0, 1], [2, 3]):
        parts = [next(steps) for _ in range(micro_batches)]
        assert [row.group for part in parts for row in part["rollouts"]] == sorted(groups * 2)
        assert all(part["totals"].groups == groups for part in parts)
        totals = parts[0]["totals"]
        assert (totals.rows, totals.tokens, totals.sampled_tokens) == (4, 16, 8)
    json.dumps(vars(totals))
