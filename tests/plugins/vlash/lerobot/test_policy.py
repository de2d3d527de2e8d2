"""The policy in inference."""

import copy
import logging

import pytest
import torch
from lerobot.policies.factory import make_policy, make_pre_post_processors
from tiny_lerobot import ACT, CAMERA, DIFFUSION, PI, STATE, observation, perturbed, smolvla

from pronghorn.vlash.chunks import ChunkRequest
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.watchdog import InvalidChunkError

BASES = ("act", "diffusion", "pi0", "pi05", "smolvla")
STEPS = {"chunk_size": 12, "n_action_steps": 4, "inference_overlap_steps": 2, "max_delay_steps": 4}


@pytest.fixture(scope="session")
def smolvla_options(tmp_path_factory):
    return smolvla(tmp_path_factory.mktemp("smolvla"))


@pytest.fixture
def make(tiny_pi, meta, tokenizer, smolvla_options):
    """Makes a policy as lerobot-train does."""

    def build(base, **options):
        given = {"act": ACT, "diffusion": DIFFUSION, "pi0": PI, "pi05": PI, "smolvla": smolvla_options}[base]
        words = {"tokenizer": str(tokenizer)} if base in ("pi0", "pi05") else {}
        torch.manual_seed(0)
        config = VLASHConfig(**{"base": base, "base_config": given, "device": "cpu", **STEPS, **words, **options})
        return perturbed(make_policy(config, ds_meta=meta))

    return build


def run(policy, ticks, seed=0):
    """What lerobot-eval does, in noise."""
    before, after = make_pre_post_processors(policy.config)
    policy.reset()
    torch.manual_seed(seed)
    with torch.inference_mode():
        return [after(policy.select_action(before(observation(seed=tick)))) for tick in range(ticks)]


def run_wrapped(policy, ticks, seed=0):
    """The same, without VLASH."""
    base, processors = policy.base, policy.processors
    base.reset()
    torch.manual_seed(seed)
    with torch.inference_mode():
        return [
            processors.after(base.select_action(processors.before(observation(seed=tick)))) for tick in range(ticks)
        ]


def requests_of(policy, ticks):
    """The requests that a run makes."""
    asked = []
    predict = policy.predict

    def record(request):
        asked.append(request)
        return predict(request)

    policy.predict = record
    actions = run(policy, ticks)
    del policy.predict
    return asked, actions


@pytest.mark.parametrize("base", BASES)
def test_without_delay_it_is_the_wrapped_policy(make, base):
    policy = make(base, inference_overlap_steps=0)
    policy.base.config.n_action_steps = 4
    ours, theirs = run(policy, 10), run_wrapped(policy, 10)
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_a_chunk_is_asked_for_the_state_after_the_pending_actions(make, base):
    policy = make(base)
    asked, actions = requests_of(policy, 10)
    assert [request.delay for request in asked] == [0, 2, 2]
    assert torch.equal(asked[0].state, observation(seed=0)[STATE])
    # The second is asked for in tick 2, when actions 2 and 3 are pending.
    assert torch.equal(asked[1].state, actions[3])
    assert torch.equal(asked[1].observation.state, observation(seed=2)[STATE])
    torch.manual_seed(1)
    expected = policy.predict(asked[1])
    assert expected.shape == (2, 12, 2)


def test_the_wrapped_policy_sees_the_estimate_normalised_as_a_state(make, meta):
    policy = make("act")
    seen = []
    policy.base.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][STATE]))
    _, actions = requests_of(policy, 4)
    stats = {name: torch.tensor(value, dtype=torch.float32) for name, value in meta.stats[STATE].items()}
    assert torch.allclose(seen[1], (actions[3] - stats["mean"]) / (stats["std"] + 1e-8), atol=1e-6)


def test_pi05s_prompt_is_made_of_the_estimate(make, tokenizer):
    from transformers import AutoTokenizer

    policy = make("pi05", tokenizer=str(tokenizer), base_config={**PI, "tokenizer_max_length": 64})
    words = AutoTokenizer.from_pretrained(tokenizer)
    prompts = []
    embed = policy.base.model.embed_prefix

    def read(images, masks, tokens, token_masks):
        prompts.append(words.decode(tokens[0], skip_special_tokens=True).replace(" ", ""))
        return embed(images, masks, tokens, token_masks)

    policy.base.model.embed_prefix = read
    asked, _ = requests_of(policy, 3)
    normalised = policy.processors.before({**observation(seed=2), STATE: asked[1].state})[STATE][0]
    bins = (torch.bucketize(normalised, torch.linspace(-1, 1, 257)[:-1], right=True) - 1).tolist()
    assert prompts[1].endswith(f"State:{bins[0]}{bins[1]};\nAction:")
    assert prompts[1] != prompts[0]


def test_a_policy_with_a_history_sees_every_observation_and_the_estimate_last(make):
    policy = make("diffusion")
    seen = []
    generate = policy.base.diffusion.generate_actions

    def record(batch, noise=None):
        seen.append(batch)
        return generate(batch, noise)

    policy.base.diffusion.generate_actions = record
    asked, actions = requests_of(policy, 4)
    assert torch.equal(asked[0].observation.content[STATE], observation(seed=0)[STATE][:, None].expand(-1, 2, -1))
    states = torch.stack([observation(seed=1)[STATE], actions[3]], dim=1)
    expected = policy.processors.before({**asked[1].observation.content, STATE: states})
    assert torch.equal(seen[1][STATE], expected[STATE])
    images = torch.stack([observation(seed=tick)[CAMERA] for tick in (1, 2)], dim=1)
    assert torch.equal(asked[1].observation.content[CAMERA], images)


def test_one_call_gives_one_command_of_several_actions(make):
    single, merged = make("act", n_action_steps=8), make("act", n_action_steps=8, action_quant_ratio=2)
    asked, actions = requests_of(merged, 4)
    assert [request.delay for request in asked] == [0, 4]
    chunk = single.predict(asked[0])
    assert all(torch.equal(action, chunk[:, 2 * tick + 1]) for tick, action in enumerate(actions))


def test_changes_are_added_up(make):
    policy = make("act", n_action_steps=8, action_quant_ratio=4, delta_dims=[0], state_estimator="sum_delta")
    asked, actions = requests_of(policy, 2)
    chunk = policy.predict(asked[0])
    assert torch.allclose(actions[0][:, 0], chunk[:, :4, 0].sum(1), atol=1e-3)
    assert torch.equal(actions[0][:, 1], chunk[:, 3, 1])


def test_an_episode_begins_with_nothing_of_the_old_one(make):
    policy = make("diffusion")
    first = run(policy, 6)
    again = run(policy, 6)
    assert all(torch.equal(own, other) for own, other in zip(first, again, strict=True))


def test_settings_may_be_changed_between_episodes(make):
    policy = make("act")
    policy.config.inference_overlap_steps = 1
    asked, _ = requests_of(policy, 5)
    assert [request.delay for request in asked] == [0, 1]


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_comes_back_bit_for_bit(make, base, tmp_path):
    policy = make(base)
    policy.save_pretrained(tmp_path)
    again = VLASHPolicy.from_pretrained(tmp_path)
    assert again.config == policy.config
    own, other = policy.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert all(torch.equal(first, second) for first, second in zip(run(policy, 6), run(again, 6), strict=True))


def test_a_checkpoint_may_be_loaded_with_layers_that_begin_without_effect(make, tmp_path):
    policy = make("pi05")
    policy.save_pretrained(tmp_path)
    config = copy.deepcopy(policy.config)
    config.delay_conditioning = True
    again = VLASHPolicy.from_pretrained(tmp_path, config=config)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(run(policy, 6), run(again, 6), strict=True))


def test_joined_projections_compute_the_same(make, tmp_path):
    policy = make("pi0")
    policy.save_pretrained(tmp_path / "plain")
    config = copy.deepcopy(policy.config)
    config.fuse_projections = True
    joined = VLASHPolicy.from_pretrained(tmp_path / "plain", config=config)
    assert "qkv_proj" in str(joined.base) and "gate_up_proj" in str(joined.base)  # noqa: PT018
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(run(policy, 6), run(joined, 6), strict=True))
    joined.save_pretrained(tmp_path / "joined")
    config.fuse_projections = False
    again = VLASHPolicy.from_pretrained(tmp_path / "joined", config=config)
    own, other = policy.state_dict(), again.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("base", ["pi0", "pi05"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_are_read_with_and_without_model_before_their_names(make, base, prefix, tmp_path, meta):
    from safetensors.torch import save_file

    policy = make(base)
    policy.base.save_pretrained(tmp_path)
    policy.processors.save(tmp_path)
    weights = {name.removeprefix("model."): value.clone() for name, value in policy.base.state_dict().items()}
    if base == "pi05":  # as pi0 calls them, which some checkpoints of pi0.5 do too
        weights = {name.replace("time_mlp_", "action_time_mlp_"): value for name, value in weights.items()}
    save_file({prefix + name: value for name, value in weights.items()}, tmp_path / "model.safetensors")
    options = {"tokenizer": policy.config.tokenizer, "device": "cpu", "n_action_steps": 4}
    again = make_policy(VLASHConfig(base=base, base_path=str(tmp_path), **options), ds_meta=meta)
    own, other = policy.base.state_dict(), again.base.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_weights_that_do_not_fit_are_named(make, tmp_path, meta):
    policy = make("act")
    policy.base.save_pretrained(tmp_path)
    policy.processors.save(tmp_path)
    narrow = VLASHConfig(
        base="act", base_path=str(tmp_path), base_config={"dim_feedforward": 8}, device="cpu", n_action_steps=4
    )
    with pytest.raises(ValueError, match=r"do not fit: .* have other shapes \(.*linear1.*\[16, 16\] for \[8, 16\]"):
        make_policy(narrow, ds_meta=meta)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model.safetensors"):
        make_policy(VLASHConfig(base="act", base_path=str(tmp_path), device="cpu", n_action_steps=4), ds_meta=meta)


def test_another_policys_checkpoint_is_refused(make, tmp_path):
    policy = make("act")
    policy.base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder base, .*--policy.base_path"):
        VLASHPolicy.from_pretrained(tmp_path)


def test_statistics_that_are_missing_are_named(make, tmp_path):
    policy = make("act")
    policy.base.save_pretrained(tmp_path)
    policy.processors.save(tmp_path)
    config = VLASHConfig(base="act", base_path=str(tmp_path), device="cpu", n_action_steps=4)
    config.input_features = {
        "observation.images.wrist": policy.config.input_features[CAMERA],
        STATE: policy.config.input_features[STATE],
    }
    config.output_features = policy.config.output_features
    with pytest.raises(
        ValueError, match=r"no statistics to normalise observation.images.wrist with, only of .*observation.image"
    ):
        VLASHPolicy(config)


def test_a_missing_camera_is_named(make):
    policy = make("act")
    seen = observation()
    del seen[CAMERA]
    with pytest.raises(ValueError, match=f"batch: got {STATE}, but the policy was made with {CAMERA} too"):
        policy.select_action(seen)


def test_an_action_that_is_not_finite_stops_it_until_the_next_episode(make):
    policy = make("act")
    with torch.no_grad():
        policy.base.model.action_head.bias[0] = float("nan")
    with pytest.raises(InvalidChunkError, match="NaN"):
        run(policy, 1)


def test_a_state_that_actions_cannot_stand_for_is_refused_at_once(make, meta):
    wider = copy.copy(meta)
    wider.info = copy.deepcopy(meta.info)
    wider.info.features[STATE]["shape"] = (3,)
    config = VLASHConfig(base="act", base_config=ACT, device="cpu", **STEPS)
    with pytest.raises(ValueError, match="3 coordinates of the state and 2 of an action"):
        make_policy(config, ds_meta=wider)
    masked = VLASHConfig(
        base="act",
        base_config=ACT,
        device="cpu",
        state_estimator="delta_masked",
        state_from_action=[0, 1, None],
        **STEPS,
    )
    assert isinstance(make_policy(masked, ds_meta=wider), VLASHPolicy)


def test_a_tokenizer_for_a_policy_that_reads_no_text_is_refused(make):
    with pytest.raises(ValueError, match="tokenizer: got one for 'act', which reads no text"):
        make("act", tokenizer="somewhere")


def test_a_delay_beyond_those_of_training_is_told_of(make, caplog):
    caplog.set_level(logging.WARNING)
    make("act", max_delay_steps=1)
    assert "a delay of 2 control steps" in caplog.text
    caplog.clear()
    policy = make("act", max_delay_steps=2)
    assert not caplog.text
    for delay, told in ((2, 0), (3, 1), (4, 1)):
        seen = policy.observe(observation())
        policy.predict(ChunkRequest(seen, seen.state, delay))
        assert caplog.text.count("at most max_delay_steps, 2") == told


def test_predict_action_chunk_gives_a_whole_chunk(make):
    policy = make("diffusion")
    torch.manual_seed(0)
    chunk = policy.predict_action_chunk(observation())
    assert chunk.shape == (2, 12, 2)
    assert torch.equal(run(policy, 1)[0], chunk[:, 0])


@pytest.mark.parametrize("base", ["pi0", "pi05", "smolvla"])
@pytest.mark.parametrize("mode", ["naive", "rtc", "rtc_full", "sync"])
def test_peers_run_under_the_same_engine(make, base, mode):
    asked, actions = requests_of(make(base, async_mode=mode), 7)
    assert [request.delay for request in asked] == ([0, 0] if mode == "sync" else [0, 2, 2])
    assert torch.equal(asked[1].state, observation(seed=4 if mode == "sync" else 2)[STATE])
    assert all(action.isfinite().all() for action in actions)


@pytest.mark.parametrize("base", ["pi05", "smolvla"])
@pytest.mark.parametrize("mode", ["rtc", "rtc_full"])
def test_guided_chunks_agree_more_with_what_runs(make, base, mode):
    options = {"n_action_steps": 4, "inference_overlap_steps": 3}
    policy = make(base, async_mode=mode, **options)
    asked, _ = requests_of(policy, 2)
    leftover = asked[1].leftover

    def apart(policy):
        torch.manual_seed(5)
        return (policy.predict(asked[1])[:, :3] - leftover[:, :3]).abs().mean()

    free = make(base, async_mode="naive", **options)
    assert apart(policy) < 0.5 * apart(free)


@pytest.mark.parametrize("mode", ["rtc", "rtc_full"])
def test_guidance_is_the_same_through_lerobots_sampling_and_ours(make, mode, tmp_path):
    theirs = make("pi05", async_mode=mode)
    theirs.save_pretrained(tmp_path)
    config = copy.deepcopy(theirs.config)
    config.fuse_projections = True
    ours = VLASHPolicy.from_pretrained(tmp_path, config=config)
    asked, _ = requests_of(theirs, 3)
    chunks = []
    for policy in (theirs, ours):
        torch.manual_seed(5)
        chunks.append(policy.predict(asked[1]))
    assert torch.allclose(*chunks, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("base", ["pi0", "smolvla"])
def test_lerobots_guidance_is_not_that_through_the_network(make, base):
    own, full = make(base, async_mode="rtc"), make(base, async_mode="rtc_full")
    asked, _ = requests_of(own, 3)
    chunks = []
    for policy in (own, full):
        torch.manual_seed(5)
        chunks.append(policy.predict(asked[1]))
    assert not torch.allclose(*chunks, rtol=1e-2)
