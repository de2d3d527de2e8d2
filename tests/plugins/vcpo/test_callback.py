"""The learning rate's scaling in TRL's own trainers, and what acts when effective samples stay few."""

import math

import pytest
import torch
from tests.plugins.vcpo.addition import SMALL, first_digit, llama, sums, tokenizer
from tests.plugins.vcpo.test_trainer import SeededRollouts, logged, trained, weights
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pronghorn.vcpo.trl.callback import VCPOCallback
from pronghorn.vcpo.trl.config import VCPOConfig
from pronghorn.vcpo.trl.early_warning import EarlyWarning
from pronghorn.vcpo.trl.trainer import VCPOTrainer


def watched(folder, kind, configuration, callback=None, steps=3, **settings):
    """A trainer of TRL with the callback, after some steps."""
    named = {key: settings.pop(key) for key in ("rollout_func",) if key in settings}
    config = configuration(str(folder), max_steps=steps, **{**SMALL, **settings})
    trainer = kind(llama(), first_digit, config, train_dataset=sums(), processing_class=tokenizer(), **named)
    trainer.add_callback(VCPOCallback(trainer, **(callback or {})))
    trainer.train()
    return trainer


def test_ratios_are_to_the_sampler_and_rates_follow_them(tmp_path):
    settings = {"loss_type": "cispo", "epsilon_high": 8.0}
    ours = trained(tmp_path / "a", estimator="trl", opob="off", rollout_func=SeededRollouts(), **settings)
    theirs = watched(tmp_path / "b", GRPOTrainer, GRPOConfig, rollout_func=SeededRollouts(), **settings)
    # Losses differ, TRL's own has ratios to the learner of the moment; the first update's ratios are the same.
    assert logged(ours, "vcpo/ess_ratio")[0] == pytest.approx(logged(theirs, "vcpo/ess_ratio")[0])
    for ratio, scale in zip(logged(theirs, "vcpo/ess_ratio"), logged(theirs, "vcpo/learning_rate_scale"), strict=True):
        assert scale == pytest.approx(math.sqrt(ratio))
        assert ratio < 0.99
    assert logged(theirs, "learning_rate") == logged(ours, "learning_rate")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_micro_batches_are_one_minibatch(accumulation, tmp_path):
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = watched(tmp_path, GRPOTrainer, GRPOConfig, steps=1, rollout_func=SeededRollouts(), **settings)
    ours = trained(tmp_path / "ours", steps=1, rollout_func=SeededRollouts())
    assert logged(trainer, "vcpo/ess_ratio") == pytest.approx(logged(ours, "vcpo/ess_ratio"), rel=1e-5)


def test_grpo_that_uses_a_generation_several_times(tmp_path):
    trainer = watched(tmp_path, GRPOTrainer, GRPOConfig, steps=4, steps_per_generation=4, learning_rate=3e-2)
    ratios = logged(trainer, "vcpo/ess_ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-5)
    assert ratios[3] < 0.999


def test_rloo(tmp_path):
    trainer = watched(tmp_path, RLOOTrainer, RLOOConfig, steps=4, steps_per_generation=4, beta=0.0, learning_rate=3e-2)
    ratios = logged(trainer, "vcpo/ess_ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-5)
    assert ratios[3] < 0.999


def test_on_policy_without_log_probabilities(tmp_path):
    assert logged(watched(tmp_path, GRPOTrainer, GRPOConfig), "vcpo/ess_ratio") == pytest.approx([1, 1, 1])


def test_a_sampler_that_tells_nothing(tmp_path):
    class Silent(SeededRollouts):
        def __call__(self, prompts, trainer):
            return {**super().__call__(prompts, trainer), "logprobs": None}

    with pytest.raises(ValueError, match=r"^sampling_per_token_logps: the batch has none"):
        watched(tmp_path, GRPOTrainer, GRPOConfig, rollout_func=Silent())
    with pytest.raises(ValueError, match=r"^sampling_per_token_logps: the sampler gave none"):
        trained(tmp_path, rollout_func=Silent())


def test_what_the_callback_refuses(tmp_path):
    with pytest.raises(TypeError, match=r"^trainer: got str"):
        VCPOCallback("trainer")
    config = GRPOConfig(str(tmp_path), **SMALL)
    trainer = GRPOTrainer(llama(), first_digit, config, train_dataset=sums(), processing_class=tokenizer())
    with pytest.raises(ValueError, match=r"^ess_reference: got 'auto'"):
        VCPOCallback(trainer, ess_reference="auto")
    with pytest.raises(ValueError, match=r"^ess_scaling: got 'cube'"):
        VCPOCallback(trainer, ess_scaling="cube")


class Shifting(SeededRollouts):
    """Ratios that are wild from one update on."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def __call__(self, prompts, trainer):
        self.shift = 5.0 if trainer.state.global_step >= self.first else 0.05
        return super().__call__(prompts, trainer)


def warned(folder, action, steps=6, **settings):
    """A trainer whose ratios are wild from the third update on, and its warning."""
    config = VCPOConfig(str(folder), max_steps=steps, lr_scheduler_type="constant", **{**SMALL, **settings})
    trainer = VCPOTrainer(llama(), first_digit, config, train_dataset=sums(), processing_class=tokenizer(),
                          rollout_func=Shifting(2))  # fmt: skip
    warning = EarlyWarning(trainer.scaling, threshold=0.5, patience=2, action=action, keep_every=1)
    trainer.add_callback(warning)
    trainer.train()
    return trainer, warning


def test_it_warns_and_changes_nothing(tmp_path, caplog):
    trainer, warning = warned(tmp_path / "a", "warn")
    plain = trained(tmp_path / "b", steps=6, lr_scheduler_type="constant", rollout_func=Shifting(2))
    assert warning.acted == [4, 6]
    assert "effective samples are" in caplog.text
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=0, atol=0)


def test_it_lowers_the_rate_for_good(tmp_path):
    trainer, _ = warned(tmp_path, "lower")
    rate = SMALL["learning_rate"]
    assert logged(trainer, "learning_rate") == pytest.approx([rate] * 4 + [rate / 2] * 2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate / 4)


def test_it_pauses_with_a_checkpoint(tmp_path):
    trainer, warning = warned(tmp_path, "pause", save_strategy="steps", save_steps=100)
    assert warning.acted == [4]
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "vcpo_state.json").exists()


def test_it_rolls_back_to_the_last_sound_update(tmp_path):
    trainer, warning = warned(tmp_path / "a", "rollback", steps=4)
    sound = trained(tmp_path / "b", steps=2, lr_scheduler_type="constant", rollout_func=Shifting(2))
    assert warning.acted == [4]
    torch.testing.assert_close(weights(trainer), weights(sound), rtol=0, atol=0)
    moments = trainer.optimizer.state_dict()["state"]
    assert all(state["step"] == 2 for state in moments.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"action": "panic"}, "action: got 'panic'"), ({"threshold": 0}, "threshold: got 0"),
     ({"factor": 1.0}, "factor: got 1.0"), ({"patience": 0}, "patience: got 0"), ({"keep_every": 1.5}, "keep_every")],
)  # fmt: skip
def test_settings_that_are_none(changed, message):
    with pytest.raises(ValueError, match=message):
        EarlyWarning(None, **changed)


def test_the_share_is_of_what_there_is_without_lag(tmp_path):
    trainer = trained(tmp_path, steps=2, ess_reference=0.5, rollout_func=SeededRollouts())
    share = logged(trainer, "vcpo/ess_ratio")[-1] / 0.5
    assert trainer.scaling.ratio_to_reference == pytest.approx(share)
    assert logged(trainer, "vcpo/learning_rate_scale")[-1] == 1.0
