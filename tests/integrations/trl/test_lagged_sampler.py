"""Whose weights a sampler with lag samples with, and that the learner's are as they were."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pronghorn.trl.lagged_sampler import LaggedSampler


class Trainer:
    """What the sampler needs of one: tokens are the first weight, so that they tell who sampled."""

    use_vllm, num_generations, num_generations_eval = False, 2, 1

    def __init__(self, log_probs=True):
        self.model = nn.Linear(1, 1, bias=False)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"))
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=True)
        self.images, self.log_probs, self.fails = None, log_probs, False
        with torch.no_grad():
            self.model.weight.fill_(0)

    def _tokenize_prompts(self, prompts):
        return [[1]] * len(prompts), self.images, {}

    def _generate_single_turn(self, prompt_ids, images, fields, generations):
        if self.fails:
            raise RuntimeError("the engine died")
        token = int(self.model.weight)
        return [[token]] * len(prompt_ids), [[-float(token)]] * len(prompt_ids)


def update(trainer, sampler):
    """The weight counts updates."""
    with torch.no_grad():
        trainer.model.weight += 1
    trainer.state.global_step += 1
    sampler.on_step_end(None, trainer.state, None, model=trainer.model)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_it_samples_with_weights_of_so_many_updates_ago(lag):
    trainer, sampler = Trainer(), LaggedSampler(lag)
    sampler.on_train_begin(None, trainer.state, None, model=trainer.model)
    for step in range(6):
        found = sampler(["a", "a"], trainer)
        wanted = max(0, step - lag)
        assert found == {"prompt_ids": [[1]] * 2, "completion_ids": [[wanted]] * 2, "logprobs": [[-wanted]] * 2,
                         "policy_version": [wanted] * 2}  # fmt: skip
        assert float(trainer.model.weight) == step
        update(trainer, sampler)


def test_what_learns_is_as_it_was_where_the_engine_dies():
    trainer, sampler = Trainer(), LaggedSampler(2)
    for _ in range(3):
        update(trainer, sampler)
    trainer.fails = True
    with pytest.raises(RuntimeError, match="the engine died"):
        sampler(["a"], trainer)
    assert float(trainer.model.weight) == 3


def test_copies_survive_a_restart(tmp_path):
    trainer, sampler = Trainer(), LaggedSampler(2)
    sampler.on_train_begin(None, trainer.state, None, model=trainer.model)
    for _ in range(5):
        update(trainer, sampler)
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    sampler.on_save(SimpleNamespace(output_dir=str(tmp_path)), trainer.state, None)
    other = LaggedSampler(2)
    other.load(folder, trainer.model)
    assert other(["a"], trainer) == sampler(["a"], trainer)
    assert other(["a"], trainer)["policy_version"] == [3]
    with pytest.raises(FileNotFoundError):
        LaggedSampler(2).load(tmp_path, trainer.model)


def test_images_are_refused():
    trainer = Trainer()
    trainer.images = [["picture"]]
    with pytest.raises(ValueError, match=r"^prompts: got images"):
        LaggedSampler(1)(["a"], trainer)


@pytest.mark.parametrize(("lag", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)])
def test_what_is_no_lag(lag, error):
    with pytest.raises(error, match=r"^lag: got"):
        LaggedSampler(lag)
