"""The trainer within TRL: what it learns is the method's, whatever batches, ranks or restarts it is cut into."""

import math

import pytest
import torch
import transformers
from tests.plugins.vcpo.addition import SMALL, first_digit, llama, sums, tokenizer
from trl import GRPOConfig, GRPOTrainer

from pronghorn.files.json_files import load_json, save_json
from pronghorn.trl.lagged_sampler import LaggedSampler
from pronghorn.vcpo.records import read_run
from pronghorn.vcpo.trl.config import VCPOConfig
from pronghorn.vcpo.trl.trainer import VCPOTrainer


def trained(folder, steps=3, kind=VCPOTrainer, model=None, reward=first_digit, resume=None, **settings):
    """A trainer after some steps."""
    configuration = VCPOConfig if kind is VCPOTrainer else GRPOConfig
    named = {key: settings.pop(key) for key in ("rollout_func", "callbacks", "peft_config") if key in settings}
    config = configuration(str(folder), max_steps=steps, **{**SMALL, **settings})
    trainer = kind(model or llama(), reward, config, train_dataset=sums(), processing_class=tokenizer(), **named)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class SeededRollouts:
    """Completions that depend on the prompt and the update alone, with log-probabilities that are off by some."""

    def __init__(self, shift=0.3, missing=()):
        self.shift, self.missing = shift, missing

    def __call__(self, prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        seen, completions, log_probs = {}, [], []
        for prompt in prompts:
            number = seen[prompt] = seen.get(prompt, -1) + 1
            generator = torch.Generator().manual_seed(hash_of(prompt) + 1000 * number + trainer.state.global_step)
            length = int(torch.randint(1, 4, (1,), generator=generator))
            completions.append(torch.randint(0, 10, (length,), generator=generator).tolist())
            values = -2.6 + self.shift * torch.randn(length, generator=generator)
            log_probs.append(
                [math.nan if place in self.missing else value for place, value in enumerate(values.tolist())]
            )
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": log_probs}


def hash_of(prompt):
    return sum(ord(letter) * 31**place for place, letter in enumerate(prompt)) % 10**6


@pytest.mark.fault(25)
def test_neutral_settings_are_grpo_step_by_step(tmp_path, figure):
    """Without baseline and scaling, on what the learner sampled itself, it is TRL's loss_type="grpo"."""
    ours = trained(tmp_path / "a", opob="off", ess_scaling="off", is_truncation=None, rollout_func=OnPolicy())
    theirs = trained(tmp_path / "b", kind=GRPOTrainer, loss_type="grpo", rollout_func=OnPolicy())
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)
    stock = weights(theirs)
    figure("largest difference of weights", max(float((a - stock[n]).abs().max()) for n, a in weights(ours).items()))
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)
    assert logged(ours, "reward") == logged(theirs, "reward")


class OnPolicy(SeededRollouts):
    """The same, with the learner's own log-probabilities."""

    def __call__(self, prompts, trainer):
        found = super().__call__(prompts, trainer)
        for row, (prompt, completion) in enumerate(zip(found["prompt_ids"], found["completion_ids"], strict=True)):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            tokens = torch.tensor(completion)[:, None]
            found["logprobs"][row] = logits.log_softmax(-1).gather(-1, tokens)[:, 0].tolist()
        return found


def test_ratios_of_tokens_are_trls_cispo(tmp_path):
    """Of completions of one length, where a mean over tokens is one over sequences."""

    class OneLength(SeededRollouts):
        def __call__(self, prompts, trainer):
            found = super().__call__(prompts, trainer)
            for name in ("completion_ids", "logprobs"):
                found[name] = [row[:1] for row in found[name]]
            return found

    ours = trained(tmp_path / "a", opob="off", ess_scaling="off", is_mode="token_truncate", is_truncation=1.1,
                   rollout_func=OneLength())  # fmt: skip
    theirs = trained(tmp_path / "b", opob="off", ess_scaling="off", estimator="trl", loss_type="cispo",
                     epsilon_high=1.1, rollout_func=OneLength())  # fmt: skip
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opob", ["group", "minibatch"])
@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"opob_grad_norm": "ghost"},
        {"opob_grad_norm": "ghost", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"opob_grad_norm": "ghost", "gradient_checkpointing": True},
    ],
    ids=["1x8", "2x4", "ghost", "ghost 2x4", "ghost, checkpointing"],
)
def test_however_a_step_is_cut(cut, opob, tmp_path):
    whole = trained(tmp_path / "a", opob=opob, rollout_func=SeededRollouts())
    parts = trained(tmp_path / "b", opob=opob, rollout_func=SeededRollouts(), **cut)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    assert logged(parts, "vcpo/ess_ratio") == pytest.approx(logged(whole, "vcpo/ess_ratio"), rel=1e-5)
    assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)


def test_the_rate_is_scaled_in_an_update_and_scheduled_as_ever(tmp_path):
    trainer = trained(tmp_path, rollout_func=SeededRollouts(1.0), steps=4)
    plain = trained(tmp_path / "b", rollout_func=SeededRollouts(1.0), steps=4, ess_scaling="off")
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    for ratio, scale, rate, scheduled in zip(
        *(logged(trainer, name) for name in ("vcpo/ess_ratio", "vcpo/learning_rate_scale", "vcpo/learning_rate",
                                             "learning_rate")), strict=True
    ):  # fmt: skip
        assert scale == pytest.approx(math.sqrt(ratio))
        assert ratio < 0.9
        assert rate == pytest.approx(scale * scheduled)
    assert set(logged(plain, "vcpo/learning_rate_scale")) == {1.0}


def test_one_update_is_the_scaled_rate_alone(tmp_path):
    """Of stochastic gradient descent: the update is as much smaller as the rate is."""
    before = llama().state_dict()
    moved = []
    for scaling in ("linear", "off"):
        trainer = trained(
            tmp_path / scaling, steps=1, ess_scaling=scaling, optim="sgd", rollout_func=SeededRollouts(1.0)
        )
        moved.append({name: value - before[name] for name, value in weights(trainer).items()})
        ratio = logged(trainer, "vcpo/ess_ratio")[0]
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(moved[0][name], ratio * moved[1][name], rtol=1e-3, atol=1e-7)


@pytest.mark.fault(25)
def test_lag_makes_rollouts_old_and_ratios_differ(tmp_path):
    trainer = trained(tmp_path, steps=6, lag=3, learning_rate=3e-2)
    run = read_run(tmp_path)
    assert run.staleness.reshape(6, 8).max(1).tolist() == [0, 1, 2, 3, 3, 3]
    assert run.steps["ess_ratio"][0] == pytest.approx(1, abs=1e-5)
    assert (run.steps["ess_ratio"][3:] < 0.999).all()
    assert logged(trainer, "vcpo/staleness_max") == [0, 1, 2, 3, 3, 3]


@pytest.mark.fault(25)
def test_a_generation_for_several_updates_is_old(tmp_path):
    """Four updates of one generation: TRL's own log-probabilities of that moment are the sampler's."""
    trained(tmp_path, steps=8, steps_per_generation=4, gradient_accumulation_steps=1)
    run = read_run(tmp_path)
    assert run.staleness.reshape(8, 8)[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert run.steps["ess_ratio"][0] == pytest.approx(1, abs=1e-5)
    assert run.steps["ess_ratio"][3] < 0.999


@pytest.mark.fault(25)
def test_on_policy_every_ratio_is_one(tmp_path):
    trainer = trained(tmp_path)
    assert logged(trainer, "vcpo/ess_ratio") == pytest.approx([1, 1, 1], abs=1e-9)
    assert (read_run(tmp_path).trajectories["log_ratio"] == 0).all()


def test_groups_stay_whole(tmp_path):
    trained(tmp_path, steps=4, steps_per_generation=2, gradient_accumulation_steps=1)
    run = read_run(tmp_path)
    for step in range(4):
        groups = run.trajectories["group"][run.trajectories["step"] == step].tolist()
        assert len(set(groups)) == 2
        assert groups == [groups[0]] * 4 + [groups[4]] * 4


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.fault(8, 25)
def test_a_run_that_goes_on_is_the_run(lag, tmp_path):
    """Weights, records, the automatic reference and the sampler's old weights."""
    settings = {"lag": lag, "ess_reference": "auto", "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", steps=6, **settings)
    trained(tmp_path / "cut", steps=6, callbacks=[StopAt(3)], **settings)
    onward = trained(tmp_path / "cut", steps=6, resume=str(tmp_path / "cut" / "checkpoint-3"), **settings)
    torch.testing.assert_close(weights(onward), weights(whole), rtol=1e-5, atol=1e-6)
    for name in ("ess_ratio", "ess_reference", "reward", "staleness_mean"):
        ours, theirs = (read_run(tmp_path / folder).steps[name] for folder in ("cut", "whole"))
        assert ours == pytest.approx(theirs, rel=1e-4), name


@pytest.mark.fault(9)
def test_a_checkpoint_of_another_run_is_refused_until_the_user_says_so(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "rollout_func": SeededRollouts()}
    trained(tmp_path, steps=1, **settings)
    folder = tmp_path / "checkpoint-1"
    resume = {"steps": 2, "resume": str(folder), **settings}
    told = (
        r"checkpoint-1: is of another run: is_truncation was 8\.0 and is 4\.0; opob was 'group' and is 'minibatch'\. "
    )
    with pytest.raises(ValueError, match=told + "To go on nevertheless, set force_resume"):
        trained(tmp_path, is_truncation=4.0, opob="minibatch", **resume)
    path = folder / "vcpo_state.json"
    state = load_json(path, newest=2)
    for name in ("torch", "transformers", "trl", "pronghorn", "code"):
        save_json(path, {**state, "made_with": {**state["made_with"], name: "0.0"}}, format=2)
        with pytest.raises(ValueError, match=rf"is of another run: {name} was '0\.0' and is "):
            trained(tmp_path, **resume)
    assert trained(tmp_path, is_truncation=4.0, force_resume=True, **resume).state.global_step == 2
    del state["made_with"]  # as of an earlier Pronghorn
    save_json(path, state, format=2)
    assert trained(tmp_path, **resume).state.global_step == 2


def test_training_again_begins_the_records_anew(tmp_path):
    trainer = trained(tmp_path, steps=2)
    before = read_run(tmp_path).steps["reward"].tolist()
    trainer.train()
    again = read_run(tmp_path).steps
    assert again["step"].tolist() == [0, 1]
    assert again["reward"].tolist() != before


class StopAt(transformers.TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_peft(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    runs = [
        trained(tmp_path / norm, rollout_func=SeededRollouts(), peft_config=config, opob_grad_norm=norm, lag=0)
        for norm in ("exact", "ghost")
    ]
    exact, ghost = (weights(run) for run in runs)
    torch.testing.assert_close(ghost, exact, rtol=1e-4, atol=1e-5)
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in exact.items())
    assert logged(runs[0], "vcpo/ess_ratio") == pytest.approx(logged(runs[1], "vcpo/ess_ratio"), rel=1e-5)


@pytest.mark.fault(25)
def test_missing_log_probabilities_of_tokens_count_as_ratio_one(tmp_path):
    trained(tmp_path / "some", steps=1, rollout_func=SeededRollouts(missing=(0, 1, 2)))
    assert (read_run(tmp_path / "some").trajectories["log_ratio"] == 0).all()


@pytest.mark.fault(25)
def test_what_no_function_scores_teaches_nothing(tmp_path):
    def some(completions, **kwargs):
        return [None if number % 4 == 1 else float(len(text)) for number, text in enumerate(completions)]

    trainer = trained(tmp_path, steps=2, reward=some, rollout_func=SeededRollouts())
    rows = read_run(tmp_path).trajectories
    assert (rows["response_length"].reshape(4, 4)[:, 1] == 0).all()
    assert (rows["grad_norm_unscaled"].reshape(4, 4)[:, 1] == 0).all()
    assert all(math.isfinite(value) for value in logged(trainer, "grad_norm"))


@pytest.mark.fault(25)
def test_truncated_completions_may_be_masked(tmp_path):
    trained(tmp_path, steps=1, mask_truncated_completions=True, rollout_func=SeededRollouts())
    assert (read_run(tmp_path).trajectories["response_length"] == 0).all()  # none ends with the end of text


def test_tokens_of_tools_are_not_the_policys(tmp_path):
    class WithTools(SeededRollouts):
        def __call__(self, prompts, trainer):
            found = super().__call__(prompts, trainer)
            return {**found, "env_mask": [[1] + [0] * (len(ids) - 1) for ids in found["completion_ids"]]}

    trained(tmp_path, steps=1, rollout_func=WithTools())
    assert (read_run(tmp_path).trajectories["response_length"] == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 3,
          "num_generations": 6}, r"wanted a multiple of num_generations \(6\)"),
        ({"beta": 0.1}, "beta: got 0.1, which has no use"), ({"loss_type": "dr_grpo"}, "loss_type: got 'dr_grpo'"),
        ({"estimator": "trl"}, "opob: got 'group' with estimator='trl'"), ({"estimator": "x"}, "estimator: got 'x'"),
        ({"lag": -1}, "lag: got -1"), ({"is_mode": "token_mask"}, "is_mode: got 'token_mask' with opob='group'"),
        ({"lag": 2, "rollout_func": SeededRollouts()}, "lag: got one beside a rollout_func"),
        ({"opob_grad_norm": "exactly"}, "opob_grad_norm: got 'exactly', accepted are exact, ghost"),
    ],
)  # fmt: skip
def test_what_has_no_meaning(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **settings)


@pytest.mark.fault(25)
def test_another_configuration_or_sampler(tmp_path):
    config = GRPOConfig(str(tmp_path), **SMALL)
    with pytest.raises(TypeError, match=r"^args: got GRPOConfig, wanted a VCPOConfig"):
        VCPOTrainer(llama(), first_digit, config, train_dataset=sums(), processing_class=tokenizer())
    with pytest.raises(TypeError, match=r"^lag: got 1.5"):
        LaggedSampler(1.5)

    class Infinite(SeededRollouts):
        def __call__(self, prompts, trainer):
            found = super().__call__(prompts, trainer)
            return {**found, "logprobs": [[-math.inf] * len(row) for row in found["logprobs"]]}

    with pytest.raises(ValueError, match=r"^sampler_log_probs: got -inf"):
        trained(tmp_path, rollout_func=Infinite())
