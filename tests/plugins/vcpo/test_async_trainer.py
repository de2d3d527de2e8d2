"""The asynchronous trainer: how old its rollouts are, what a checkpoint keeps, and how it ends when a part does."""

import json
import math
import queue
import time

import numpy as np
import pytest
import torch
from tests.faults.fail_at_call import FailAtCall
from tests.plugins.vcpo.addition import SMALL, llama, sums, tokenizer
from tests.plugins.vcpo.test_trainer import StopAt, logged, weights
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from pronghorn.trl.group_stream import RolloutError
from pronghorn.trl.in_process_worker import InProcessWorker
from pronghorn.vcpo.records import read_run
from pronghorn.vcpo.trl.async_config import AsyncVCPOConfig
from pronghorn.vcpo.trl.async_trainer import AsyncVCPOTrainer

ROWS, SIZE = 8, 4
GROUPS = ROWS // SIZE


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Where the model lies that all runs begin with."""
    folder = tmp_path_factory.mktemp("start")
    llama().save_pretrained(folder)
    return str(folder)


def large_digits(completions, **kwargs):
    return [sum(letter in "789" for letter in text) / 3 for text in completions]


def in_process(start, reward=large_digits, kind=InProcessWorker, max_completion_length=3):
    return kind(AutoModelForCausalLM.from_pretrained(start), tokenizer(), sums(), reward, num_generations=SIZE,
                max_completion_length=max_completion_length)  # fmt: skip


def made(folder, start, worker=None, transfer=None, steps=4, trainer=None, **settings):
    """A trainer."""
    worker = worker or in_process(start)
    config = AsyncVCPOConfig(str(folder), max_steps=steps, **{**SMALL, **settings})
    return AsyncVCPOTrainer(start, args=config, train_dataset=sums(), processing_class=tokenizer(),
                            rollout_worker=worker, weight_transfer=transfer or worker, **(trainer or {}))  # fmt: skip


def trained(*args, resume=None, callbacks=(), **settings):
    """A trainer after its steps."""
    trainer = made(*args, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class SamplerAhead(TrainerCallback):
    """Before weights are handed over: wait until the sampler has gone as far as it may."""

    def __init__(self, trainer):
        self.trainer, self.rows = trainer, trainer.args.max_age * ROWS
        # The trainer's own callback, which hands weights over, is there already and comes later.
        trainer.callback_handler.callbacks.insert(0, self)

    def on_step_end(self, args, state, control, **kwargs):
        deadline = time.monotonic() + 60
        while self.waiting() < self.rows:
            assert time.monotonic() < deadline, self.waiting()
            time.sleep(0.001)

    def waiting(self):
        return self.trainer.rollout_worker.rollout_buffer.qsize() + SIZE * len(self.trainer.rollouts.buffer.waiting)


def groups_by_step(run):
    return [
        run.trajectories["group"][run.trajectories["step"] == step].astype(int).tolist() for step in run.steps["step"]
    ]


# How old rollouts are


@pytest.mark.fault(25)
def test_without_lag_it_samples_and_learns_in_turn(start, tmp_path, figure):
    trainer = trained(tmp_path / "a", start, max_staleness=0)
    run = read_run(tmp_path / "a")
    assert (run.staleness == 0).all()
    assert run.steps["ess_ratio"] == pytest.approx(np.ones(4), abs=1e-5)
    gap = float(np.abs(run.trajectories["log_ratio"]).max())
    assert gap < 1e-5
    figure("largest gap of log-probabilities after weights are handed over", gap)
    assert groups_by_step(run) == [[2 * step] * 4 + [2 * step + 1] * 4 for step in range(4)]
    again = trained(tmp_path / "b", start, max_staleness=0)
    for name, value in weights(trainer).items():
        assert torch.equal(value, weights(again)[name]), name
    assert not torch.equal(value, llama().state_dict()[name])


def test_however_a_step_is_cut(start, tmp_path):
    whole = trained(tmp_path / "a", start, max_staleness=0)
    for number, cut in enumerate(
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, {"opob_grad_norm": "ghost"},
         {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "opob_grad_norm": "ghost"})
    ):  # fmt: skip
        parts = trained(tmp_path / f"b{number}", start, max_staleness=0, **cut)
        torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
        assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-3)


@pytest.mark.fault(25)
def test_with_lag_4(start, tmp_path, figure):
    """Never more than 4 updates old, and as old as that; ratios are no longer 1; what is easy is learned."""
    trainer = made(tmp_path, start, steps=30, max_staleness=4)
    SamplerAhead(trainer)
    trainer.train()
    run = read_run(tmp_path)
    assert run.staleness.reshape(30, ROWS).max(1).tolist() == [0, 1, 2, 3] + [4] * 26
    assert (run.trajectories["param_version_end"] >= run.trajectories["param_version_start"]).all()
    assert run.steps["ess_ratio"][0] == pytest.approx(1, abs=1e-5)
    assert (run.steps["ess_ratio"][4:10] < 0.99).all()
    assert (np.abs(run.trajectories["log_ratio"][4 * ROWS :]) > 1e-3).mean() > 0.9
    assert groups_by_step(run) == [[2 * step] * 4 + [2 * step + 1] * 4 for step in range(30)]
    reward = run.steps["reward"]
    assert reward[-5:].mean() > reward[:5].mean() + 0.3
    figure("updates", 30)
    figure("oldest rollout, in updates", int(run.staleness.max()))
    assert max(logged(trainer, "vcpo/staleness_max")) == max(logged(trainer, "sample/staleness_max")) == 4
    assert sum(logged(trainer, "sample/dropped_groups_total")) == 0
    assert logged(trainer, "sample/rollout_queue_size")[5] >= 3 * ROWS
    assert all(seconds > 0 for seconds in logged(trainer, "perf/rollout_wait_s"))
    assert logged(trainer, "batch/groups_per_step") == [GROUPS] * 30
    assert not any("perf/fwd_s" in entry for entry in trainer.state.log_history)


@pytest.mark.fault(25)
def test_weights_that_are_handed_over_every_other_update(start, tmp_path):
    trainer = made(tmp_path, start, steps=9, max_staleness=1, weight_sync_steps=2)
    SamplerAhead(trainer).rows = 2 * ROWS  # what is left of four steps' before weights come
    trainer.train()
    run = read_run(tmp_path)
    assert set(run.trajectories["param_version_start"].tolist()) <= {0, 2, 4, 6, 8}
    assert run.staleness.max() == 3
    assert trainer.model_version == 1 + 4


@pytest.mark.fault(25)
def test_weights_that_come_in_the_middle_of_a_rollout(start, tmp_path):
    class Waits(InProcessWorker):
        """The third token of two groups waits for an update."""

        def _make(self, group):
            self.group, self.tokens = group, 0
            super()._make(group)

        def _between_tokens(self):
            version = super()._between_tokens()
            self.tokens += 1
            while self.tokens == 3 and self.group in (2, 4) and not self._updating and not self._stopping:
                time.sleep(0.001)
            return version

    worker = in_process(start, kind=Waits, max_completion_length=6)
    trained(tmp_path, start, worker=worker, steps=5, max_staleness=1, max_completion_length=6)
    run = read_run(tmp_path)
    spans = run.trajectories["param_version_end"] - run.trajectories["param_version_start"]
    for group in (2, 4):
        assert spans[run.trajectories["group"] == str(group)].max() == 1
    assert spans[run.trajectories["group"] == "0"].max() == 0
    assert run.staleness.max() == 1


class Foreign:
    """Someone else's worker: groups of each version, one of them from long ago, without stamps of ours."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue, self.group = queue.Queue(), queue.Queue(), 0

    def start(self):
        self.running = True

    def stop(self):
        self.running = False

    def check_health(self, stale_after_s):
        assert self.running

    def update_model_version(self, model_version):
        for version in (max(1, model_version - 2), model_version, model_version):
            for row in range(SIZE):
                log_probs = np.array([0, 0, -2.5, -2.4], np.float32)
                self.rollout_buffer.put(
                    RolloutSample("1+", "2=", np.array([1, 10, 2, row]), np.array([0, 0, 1, 1]), log_probs,
                                  row - 1.5, version, self.group, {"reward": float(row)})
                )  # fmt: skip
            self.group += 1


class Nothing:
    """No weights are handed over."""

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.fault(25)
def test_what_is_too_old_is_dropped_whole(start, tmp_path, figure):
    trainer = trained(tmp_path, start, worker=Foreign(), transfer=Nothing(), steps=5, max_staleness=1)
    run = read_run(tmp_path)
    assert run.staleness.max() == 1
    # Versions 1 and 1, then one of two updates ago with each: the third and those that follow are too old.
    dropped = trainer.rollouts.dropped
    assert dropped >= 2
    figure("groups that were too old, dropped and counted", dropped)
    assert sum(logged(trainer, "sample/dropped_groups_total")) == dropped
    trained_groups = [group for groups in groups_by_step(run) for group in groups]
    assert all(trained_groups.count(group) == SIZE for group in trained_groups)
    assert len(trained_groups) == 5 * ROWS


# A run that is broken off


@pytest.mark.fault(8, 25)
def test_what_waits_survives_a_restart(start, tmp_path):
    """Each prompt is learned from once, in all: before the checkpoint, from it, or made anew."""
    settings = {"max_staleness": 3, "save_strategy": "steps", "save_steps": 3, "ess_reference": "auto"}
    first = made(tmp_path, start, steps=8, **settings)
    SamplerAhead(first)
    first.add_callback(StopAt(3))
    first.train()
    folder = tmp_path / "checkpoint-3"
    state = json.loads((folder / "rollout_state.json").read_text())
    assert state["model_version"] == 4
    assert state["trained"] == 3 * GROUPS
    waiting = state["prompt_index"] - state["trained"]
    assert waiting >= 3 * GROUPS
    assert not list(folder.glob("waiting*.json"))
    assert groups_by_step(read_run(tmp_path)) == [[2 * step] * 4 + [2 * step + 1] * 4 for step in range(3)]

    prompts = []

    def watched(prompts, completions, seen=prompts, **kwargs):
        seen.append(prompts[0])
        return large_digits(completions)

    second = made(tmp_path, start, worker=in_process(start, watched), steps=8, **settings)
    SamplerAhead(second)
    seen = []
    second.rollout_worker.update_model_version = lambda version, tell=second.rollout_worker.update_model_version: (
        seen.append(version), tell(version),
    )  # fmt: skip
    second.train(resume_from_checkpoint=str(folder))
    run = read_run(tmp_path)
    assert groups_by_step(run) == [[2 * step] * 4 + [2 * step + 1] * 4 for step in range(8)]
    assert prompts[: 16 - state["prompt_index"]] == sums()["prompt"][state["prompt_index"] : 16]
    assert seen == [4, 5, 6, 7, 8, 9, 10]  # told, handed over at the start, and after each update
    # The first that it learned from were waiting: they are as old as they would have been.
    assert run.staleness.reshape(8, ROWS).max(1).tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert second._learner.scaling.reference.state_dict() == first._learner.scaling.reference.state_dict()


@pytest.mark.fault(8)
def test_without_lag_a_run_that_goes_on_is_the_run(start, tmp_path):
    settings = {"max_staleness": 0, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", start, steps=4, **settings)
    trained(tmp_path / "cut", start, steps=4, callbacks=[StopAt(2)], **settings)
    onward = trained(tmp_path / "cut", start, steps=4, resume=str(tmp_path / "cut" / "checkpoint-2"), **settings)
    torch.testing.assert_close(weights(onward), weights(whole), rtol=1e-6, atol=1e-7)


@pytest.mark.fault(9)
def test_a_checkpoint_of_another_trainer(start, tmp_path):
    settings = {"max_staleness": 0, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, start, steps=1, **settings)
    (tmp_path / "checkpoint-1" / "vcpo_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="vcpo_state"):
        trained(tmp_path, start, steps=2, resume=str(tmp_path / "checkpoint-1"), **settings)


@pytest.mark.fault(9)
def test_a_checkpoint_of_another_run_is_refused_until_the_user_says_so(start, tmp_path):
    settings = {"max_staleness": 0, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, start, steps=1, **settings)
    resume = {"steps": 2, "resume": str(tmp_path / "checkpoint-1"), **settings, "max_staleness": 1}
    with pytest.raises(ValueError, match=r"is of another run: max_staleness was 0 and is 1\. .* set force_resume"):
        trained(tmp_path, start, **resume)
    assert trained(tmp_path, start, force_resume=True, **resume).state.global_step == 2


@pytest.mark.parametrize("strategy", ["no", "steps"])
@pytest.mark.fault(25)
def test_an_engine_that_dies_ends_training_with_its_reason(strategy, start, tmp_path):
    """And what was learned until then is kept, where checkpoints are."""
    reward = FailAtCall(large_digits, 2 * GROUPS + 1, ZeroDivisionError("the judge has died"))
    settings = {"max_staleness": 0, "save_strategy": strategy, "save_steps": 100}
    with pytest.raises(RolloutError, match="the rollout worker failed: ZeroDivisionError: the judge has died"):
        trained(tmp_path, start, worker=in_process(start, reward), steps=4, **settings)
    assert reward.fired
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"] * (strategy == "steps")
    if strategy == "steps":
        onward = trained(tmp_path, start, steps=4, resume=str(tmp_path / "checkpoint-2"), **settings)
        whole = trained(tmp_path / "whole", start, steps=4, **settings)
        torch.testing.assert_close(weights(onward), weights(whole), rtol=1e-6, atol=1e-7)


@pytest.mark.fault(25)
def test_weights_that_nobody_takes_end_training(start, tmp_path):
    worker = in_process(start)
    worker.send_weights = FailAtCall(worker.send_weights, 3, ConnectionError("no route to the engine"))
    settings = {"max_staleness": 1, "save_strategy": "steps", "save_steps": 100}
    with pytest.raises(RolloutError, match="the sampler took no weights: ConnectionError: no route to the engine"):
        trained(tmp_path, start, worker=worker, **settings)
    assert worker.send_weights.fired
    assert (tmp_path / "checkpoint-2" / "rollout_state.json").exists()
    assert worker._thread is None


def test_a_trainer_may_train_again(start, tmp_path):
    trainer = made(tmp_path, start, steps=2, max_staleness=1, save_records=False)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.rollouts.trained == 2 * GROUPS


# Rewards, and settings


@pytest.mark.fault(25)
def test_what_nobody_scores_teaches_nothing(start, tmp_path):
    def some(completions, **kwargs):
        return [None if number == 1 else float(len(text)) for number, text in enumerate(completions)]

    trainer = trained(tmp_path, start, worker=in_process(start, some), steps=2, max_staleness=0)
    rows = read_run(tmp_path).trajectories
    assert (rows["response_length"].reshape(4, 4)[:, 1] == 0).all()
    assert (rows["grad_norm_unscaled"].reshape(4, 4)[:, 1] == 0).all()
    assert all(math.isfinite(value) for value in logged(trainer, "grad_norm"))


def test_epochs_are_of_prompts(start, tmp_path):
    trainer = made(tmp_path, start, steps=-1, num_train_epochs=0.06, max_staleness=0)
    trainer.train()
    assert trainer.state.global_step == 3  # of 100 prompts, two in each step


def test_what_may_be_outstanding_follows_from_the_lag(tmp_path):
    config = AsyncVCPOConfig(str(tmp_path), **SMALL, max_staleness=4, weight_sync_steps=2)
    assert config.queue_maxsize == config.max_inflight_tasks == 8 * 5 * 2
    assert (config.max_age, config.groups_per_step) == (9, 2)
    assert AsyncVCPOConfig(str(tmp_path), **SMALL, max_staleness=0).queue_maxsize == 8
    assert AsyncVCPOConfig(str(tmp_path), **SMALL, queue_maxsize=3).queue_maxsize == 3
    assert config.to_dict()["max_staleness"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": -1}, "max_staleness: got -1, wanted a whole number of at least 0"),
        ({"max_staleness": 1.5}, "max_staleness: got 1.5"), ({"weight_sync_steps": 0}, "weight_sync_steps: got 0"),
        ({"num_generations": 3}, "num_generations: got 3 with 8 rollouts in an optimizer step"),
        ({"num_generations": 1}, "num_generations: got 1"), ({"epsilon": 0.1}, "epsilon: got 0.1, which has no use"),
        ({"token_budget": 100}, "token_budget: got 100, which has no use"),
        ({"ess_reference": "never"}, "ess_reference: got 'never'"), ({"opob": "none"}, "opob: got 'none'"),
    ],
)  # fmt: skip
def test_what_has_no_meaning(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AsyncVCPOConfig(str(tmp_path), **{**SMALL, **settings})


def test_another_configuration(start, tmp_path):
    from trl.experimental.async_grpo import AsyncGRPOConfig

    worker = in_process(start)
    with pytest.raises(TypeError, match="args: got AsyncGRPOConfig, wanted an AsyncVCPOConfig"):
        AsyncVCPOTrainer(start, None, AsyncGRPOConfig(str(tmp_path), **SMALL), sums(), tokenizer(),
                         rollout_worker=worker, weight_transfer=worker)  # fmt: skip
