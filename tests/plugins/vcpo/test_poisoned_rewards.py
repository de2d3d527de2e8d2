"""Twenty steps of GRPO with a poison in each: losses and weights stay finite, what teaches nothing moves nothing."""

import math

import pytest
import torch
from tests.plugins.vcpo.addition import llama
from tests.plugins.vcpo.test_trainer import OnPolicy, SeededRollouts, logged, trained, weights

from pronghorn.vcpo.records import read_run

STEPS = 20


class Counting:
    """A reward function that says something else now and then, and counts how often."""

    def __init__(self, poison):
        self.poison, self.fired = poison, 0

    def __call__(self, completions, **kwargs):
        rewards = [float(len(text)) + 0.1 * number for number, text in enumerate(completions)]
        return [self.changed(number, reward) for number, reward in enumerate(rewards)]

    def changed(self, number, reward):
        found = self.poison(number, reward)
        self.fired += found != reward
        return found

    __name__ = "counting"


POISONS = {
    "none": lambda number, reward: reward,
    "NaN": lambda number, reward: math.nan if number % 4 == 1 else reward,
    "a group of NaN": lambda number, reward: math.nan if number < 4 else reward,
    "all equal": lambda number, reward: 0.7,
    "all equal in a group": lambda number, reward: 0.7 if number < 4 else reward,
    "nobody scores": lambda number, reward: None if number % 4 == 1 else reward,
}


def slow_unless(value, *quick):
    return value if value in quick else pytest.param(value, marks=pytest.mark.slow)


class Empty(SeededRollouts):
    """Some completions have no token at all."""

    fired = 0

    def __call__(self, prompts, trainer):
        found = super().__call__(prompts, trainer)
        for name in ("completion_ids", "logprobs"):
            found[name][1] = []
            found[name][4:8] = [[], [], [], []]
        self.fired += 5
        return found


@pytest.mark.fault(25)
@pytest.mark.parametrize("opob", ["group", pytest.param("off", marks=pytest.mark.slow)])
@pytest.mark.parametrize("poison", [slow_unless(name, "NaN", "all equal") for name in POISONS])
def test_rewards(poison, opob, tmp_path, figure):
    reward = Counting(POISONS[poison])
    trainer = trained(tmp_path, steps=STEPS, reward=reward, rollout_func=SeededRollouts(), opob=opob)
    assert (reward.fired > 0) == (poison != "none")
    moved = [(value - before).abs().max() for value, before in zip(weights(trainer).values(), START, strict=True)]
    assert all(change.isfinite() for change in moved)
    for name in ("loss", "grad_norm", "vcpo/ess_ratio"):
        assert len(logged(trainer, name)) == STEPS
        assert all(math.isfinite(value) for value in logged(trainer, name)), name
    if poison == "all equal":
        assert max(logged(trainer, "grad_norm")) < 1e-6
    else:
        assert max(moved) > 0
    silent = read_run(tmp_path).trajectories["grad_norm_unscaled"].reshape(STEPS, 2, 4) == 0
    if poison == "a group of NaN":
        assert (silent.all(2).sum(1) == 1).all()
    if poison in ("NaN", "nobody scores"):
        assert silent[:, :, 1].all()
    figure("steps", STEPS)
    figure("rewards poisoned", reward.fired)


@pytest.mark.fault(25)
@pytest.mark.parametrize("norm", [slow_unless(norm, "exact") for norm in ("exact", "ghost")])
def test_empty_completions(norm, tmp_path, figure):
    rollouts = Empty()
    reward = Counting(POISONS["none"])
    trainer = trained(tmp_path, steps=STEPS, reward=reward, rollout_func=rollouts, opob_grad_norm=norm)
    assert rollouts.fired == 5 * STEPS
    assert all(math.isfinite(value) for name in ("loss", "grad_norm") for value in logged(trainer, name))
    rows = read_run(tmp_path).trajectories
    empty = rows["response_length"].reshape(STEPS, 8) == 0
    assert empty.sum() == 5 * STEPS
    assert (rows["grad_norm_unscaled"].reshape(STEPS, 8)[empty] == 0).all()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    figure("steps", STEPS)
    figure("empty completions", rollouts.fired)


@pytest.mark.fault(25)
@pytest.mark.slow
def test_learner_and_sampler_agree_at_every_step(tmp_path, figure):
    """The gap of their log-probabilities in float32, while weights change; and weights that stay behind are noticed."""
    trained(tmp_path / "a", steps=STEPS, rollout_func=OnPolicy(), learning_rate=3e-2)
    gaps = torch.tensor(read_run(tmp_path / "a").trajectories["log_ratio"]).abs()
    assert gaps.max() < 1e-3
    figure("steps", STEPS)
    figure("largest gap of log-probabilities", float(gaps.max()))

    class Missed(OnPolicy):
        """Its weights are those of the start."""

        def __init__(self):
            super().__init__()
            self.model = llama()

        def __call__(self, prompts, trainer):
            kept, trainer.model = trainer.model, self.model
            try:
                return super().__call__(prompts, trainer)
            finally:
                trainer.model = kept

    trainer = trained(tmp_path / "b", steps=STEPS, rollout_func=Missed(), learning_rate=3e-2)
    late = torch.tensor(read_run(tmp_path / "b").trajectories["log_ratio"]).abs()[8:]
    assert late.max() > 1e-2
    assert min(logged(trainer, "vcpo/ess_ratio")) < 0.99
    assert all(math.isfinite(value) for value in logged(trainer, "grad_norm"))


START = list(llama().state_dict().values())
