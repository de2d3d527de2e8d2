"""The policy in training."""

import json
import logging

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy
from tiny_lerobot import ACT, ACTION, DIFFUSION, PI, STATE, observation, perturbed

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.delayed_batch import PAD, Delays
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.lerobot.recorded_states import RecordedStates
from pronghorn.vlash.offsets import draw_offsets, offset_indices, state_index

ROWS = (0, 7, 19, 38)
EPISODES = {0: (0, 20), 7: (0, 20), 19: (0, 20), 38: (20, 40)}
STEPS = {"device": "cpu", "chunk_size": 6, "n_action_steps": 4, "inference_overlap_steps": 2, "max_delay_steps": 3}


@pytest.fixture
def recorded(data):
    """All actions and states of the data set."""
    rows = LeRobotDataset("tiny/local", root=data).hf_dataset.with_format("torch")
    return torch.stack(list(rows[ACTION])), torch.stack(list(rows[STATE]))


@pytest.fixture
def make(tiny_pi, meta, tokenizer):
    def build(base, **options):
        given = {"act": ACT, "diffusion": DIFFUSION, "pi0": PI, "pi05": PI}[base]
        words = {"tokenizer": str(tokenizer)} if base in ("pi0", "pi05") else {}
        torch.manual_seed(0)
        return make_policy(
            VLASHConfig(**{"base": base, "base_config": given, **STEPS, **words, **options}), ds_meta=meta
        )

    return build


def drawn(delays, batch, seed=3):
    torch.manual_seed(seed)
    expected = draw_offsets(len(ROWS), 3)
    assert len(set(expected.tolist())) > 1
    torch.manual_seed(seed)
    result = delays.draw(batch)
    assert torch.equal(result.delay, expected)
    return result


def test_the_rate_is_the_data_sets(make, meta, caplog):
    caplog.set_level(logging.WARNING)
    assert meta.fps != VLASHConfig.fps
    assert make("act").config.fps == meta.fps
    assert not caplog.text
    assert make("act", fps=50.0).config.fps == 50
    assert f"fps is 50, and the data set has {meta.fps:g} frames a second" in caplog.text


def test_delays_that_a_mode_does_not_use_are_told_of(make, caplog):
    caplog.set_level(logging.WARNING)
    make("act", async_mode="naive", max_delay_steps=0, n_action_steps=4)
    assert not caplog.text
    make("act", async_mode="naive", n_action_steps=4)
    assert "async_mode='naive' is trained with delays of up to max_delay_steps, 3" in caplog.text


def test_an_estimator_that_training_needs_is_checked_first(make, meta):
    config = VLASHConfig(
        base="act", base_config=ACT, **STEPS, async_mode="sync", state_estimator="delta_masked", state_from_action=[5]
    )
    with pytest.raises(ValueError, match="state_from_action"):
        make_policy(config, ds_meta=meta)
    config.use_state_ground_truth = True
    make_policy(config, ds_meta=meta)


def test_delays_are_those_of_the_core(samples, recorded):
    config = VLASHConfig(base="act", base_config=ACT, **STEPS)
    actions, states = recorded
    batch, delay = drawn(Delays(config, None), samples(config, ROWS))
    for place, (row, offset) in enumerate(zip(ROWS, delay.tolist(), strict=True)):
        rows, is_pad = offset_indices(row, offset, *EPISODES[row], 6)
        assert torch.equal(batch[ACTION][place], actions[rows])
        assert torch.equal(batch[PAD][place], is_pad)
        source = states if offset == 0 else actions
        assert torch.equal(batch[STATE][place], source[state_index(row, offset, *EPISODES[row])])


def test_a_history_keeps_its_older_states_and_the_chunk_begins_with_it(samples, recorded):
    config = VLASHConfig(base="diffusion", base_config=DIFFUSION, **{**STEPS, "chunk_size": 12})
    actions, states = recorded
    given = samples(config, ROWS)
    batch, delay = drawn(Delays(config, None), given)
    assert batch[STATE].shape == (4, 2, 2)
    assert torch.equal(batch[STATE][:, 0], given[STATE][:, 0])
    for place, (row, offset) in enumerate(zip(ROWS, delay.tolist(), strict=True)):
        wanted = torch.arange(row + offset - 1, row + offset + 15)
        begin, end = EPISODES[row]
        assert torch.equal(batch[ACTION][place], actions[wanted.clamp(begin, end - 1)])
        assert torch.equal(batch[PAD][place], (wanted < begin) | (wanted >= end))
        source = states if offset == 0 else actions
        assert torch.equal(batch[STATE][place, 1], source[state_index(row, offset, begin, end)])


def test_changes_are_added_to_the_state_until_the_episode_ends(samples, recorded):
    changes = {"state_estimator": "delta_masked", "state_from_action": [None, 0], "delta_dims": [0]}
    config = VLASHConfig(base="act", base_config=ACT, action_quant_ratio=2, **changes, **STEPS)
    actions, states = recorded
    batch, delay = drawn(Delays(config, None), samples(config, ROWS))
    for place, (row, offset) in enumerate(zip(ROWS, delay.tolist(), strict=True)):
        meanwhile = actions[row : min(row + offset, EPISODES[row][1])]
        assert torch.equal(batch[STATE][place, 0], states[row, 0])
        assert torch.allclose(batch[STATE][place, 1], states[row, 1] + meanwhile[:, 0].sum())
    assert delay[3] > 0


def test_states_of_the_data_set_in_place_of_actions(samples, recorded, meta):
    config = VLASHConfig(base="act", base_config=ACT, use_state_ground_truth=True, **STEPS)
    batch, delay = drawn(Delays(config, RecordedStates(meta)), samples(config, ROWS))
    for place, (row, offset) in enumerate(zip(ROWS, delay.tolist(), strict=True)):
        reached = state_index(row, offset, *EPISODES[row], ground_truth=True)
        assert torch.equal(batch[STATE][place], recorded[1][reached])


def test_states_of_a_data_set_that_is_not_there(make, samples):
    policy = make("act", use_state_ground_truth=True)
    policy.forward(samples(policy.config))
    alone = VLASHPolicy(policy.config)
    with pytest.raises(ValueError, match="use_state_ground_truth: got True for a policy that was made without"):
        alone.forward(samples(policy.config))


@pytest.mark.parametrize("base", ["act", "diffusion", "pi0", "pi05"])
def test_it_learns(make, samples, base):
    options = {"chunk_size": 12} if base == "diffusion" else {}
    policy = make(base, **options)
    batch = samples(policy.config)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    policy.train()
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_all_delays_at_once_are_what_lerobots_pi0_computes_one_by_one(make, samples):
    policy = perturbed(make("pi0", shared_observation=True))
    batch = samples(policy.config, ROWS)
    model = policy.base.model
    noise, time = torch.randn(4, 4, 6, 8), torch.rand(4, 4)
    model.sample_noise = lambda shape, device: noise
    model.sample_time = lambda count, device: time.flatten()
    loss, told = policy.forward(batch)
    assert told == {"loss": loss.item()}

    errors = []
    for offset in range(4):
        state = batch[STATE] if offset == 0 else batch[ACTION][:, offset - 1]
        one = {**batch, ACTION: batch[ACTION][:, offset : offset + 6], STATE: state}
        prepared = policy.processors.before(one)
        images, masks = policy.base._preprocess_images(prepared)
        elements = model.forward(
            images, masks, prepared["observation.language.tokens"], prepared["observation.language.attention_mask"],
            policy.base.prepare_state(prepared), policy.base.prepare_action(prepared), noise[:, offset],
            time[:, offset],
        )  # fmt: skip
        errors.append(elements.masked_fill(batch[PAD][:, offset : offset + 6, None], 0))
    assert batch[PAD].any()
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-4)


def test_what_the_loss_counts(make, samples):
    policy = make("pi0")
    batch = samples(policy.config, (0, 38))
    policy.base.model.sample_time = lambda count, device: torch.full((count,), 0.5)

    def loss(padding, reduction="mean"):
        policy.config.loss_padding = padding
        torch.manual_seed(0)
        return policy.forward(batch, reduction)[0]

    assert loss(True) != loss(False)
    assert loss(True, "none").shape == (2,)
    assert torch.allclose(loss(True, "none").mean(), loss(True))


def test_losses_of_single_samples_are_the_wrapped_policys(make, samples):
    policy = make("act")
    with pytest.raises(ValueError, match="reduction: got 'none', but act only has 'mean'"):
        policy.forward(samples(policy.config), "none")


@pytest.mark.parametrize("base", ["pi0", "pi05"])
def test_the_delay_is_told_without_effect_until_it_is_learnt(make, samples, base):
    plain, told = make(base), make(base, delay_conditioning=True)
    batch = samples(plain.config)
    told.base.load_state_dict(plain.base.state_dict(), strict=False)
    losses = []
    for policy in (plain, told):
        torch.manual_seed(0)
        losses.append(policy.forward(batch)[0])
    assert torch.equal(*losses)
    learnt = told.base.model.delay_embedding.weight
    assert any(parameter is learnt for parameter in told.get_optim_params())
    with torch.no_grad():
        perturbed(told).base.model.delay_embedding.weight[2:] += 1.0
    seen = told.observe(observation())
    from pronghorn.vlash.chunks import ChunkRequest

    chunks = []
    for delay in (0, 1, 2, 3, 9):
        torch.manual_seed(0)
        chunks.append(told.predict(ChunkRequest(seen, seen.state, delay)))
    assert not torch.allclose(chunks[1], chunks[2])
    assert torch.equal(chunks[3], chunks[4]), "a longer delay than any that is trained counts as the longest"


@pytest.mark.parametrize("base", ["pi0", "pi05"])
def test_each_sample_is_trained_with_its_own_delay(make, samples, base):
    policy = perturbed(make(base, delay_conditioning=True))
    torch.manual_seed(4)
    expected = set(draw_offsets(2, 3).tolist())
    torch.manual_seed(4)
    policy.forward(samples(policy.config, (0, 7)))[0].backward()
    told = policy.base.model.delay_embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert set(told.tolist()) == expected
    assert 0 not in expected


def test_other_policies_are_told_the_delay_by_a_coordinate(make, samples):
    policy = make("act", delay_conditioning=True)
    assert policy.base.config.input_features[STATE].shape == (3,)
    seen = []
    policy.base.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][STATE][:, 2]))
    torch.manual_seed(3)
    expected = draw_offsets(4, 3)
    torch.manual_seed(3)
    policy.forward(samples(policy.config))
    for tick in range(3):
        policy.select_action(observation(seed=tick))
    assert torch.allclose(seen[0], expected / 3)
    assert torch.equal(seen[1], torch.zeros(2))
    assert torch.allclose(seen[2], torch.full((2,), 2 / 3))


def test_a_state_seen_by_the_norms_is_not_in_the_prompt(make, samples, tmp_path, tokenizer):
    policy = make("pi05", state_cond=True, base_config={**PI, "tokenizer_max_length": 48})
    seen = observation()
    tokens = [
        policy.processors.before({**seen, STATE: seen[STATE] * scale})["observation.language.tokens"]
        for scale in (1, 2)
    ]
    assert torch.equal(*tokens)
    policy.save_pretrained(tmp_path)
    steps = json.loads((tmp_path / "base" / "policy_preprocessor.json").read_text())["steps"]
    assert "vlash_prompt_without_state" in [step["registry_name"] for step in steps]
    again = VLASHPolicy.from_pretrained(tmp_path)
    assert torch.equal(again.processors.before(seen)["observation.language.tokens"], tokens[0])
