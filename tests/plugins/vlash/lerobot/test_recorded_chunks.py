"""Chunks of pi0 and pi0.5 as they are recorded; on a CPU the same is computed without."""

import copy

import pytest
import torch
from lerobot.policies.factory import make_policy
from tiny_lerobot import PI, observation, perturbed

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig

STEPS = {"chunk_size": 12, "n_action_steps": 4, "inference_overlap_steps": 2, "max_delay_steps": 4}
kinds = pytest.mark.parametrize("base", ["pi0", "pi05"])


@pytest.fixture
def make(tiny_pi, meta, tokenizer):
    def build(base, **options):
        torch.manual_seed(0)
        given = {"base": base, "base_config": PI, "device": "cpu", "tokenizer": str(tokenizer), **STEPS, **options}
        return perturbed(make_policy(VLASHConfig(**given), ds_meta=meta))

    return build


def chunk(policy, batch=2, seed=0):
    torch.manual_seed(seed)
    return policy.predict_action_chunk(observation(batch, seed=seed))


@kinds
@pytest.mark.parametrize(("dtype", "told"), [("float32", False), ("bfloat16", True)])
def test_with_the_option_it_is_the_same_bit_for_bit(base, dtype, told, make):
    options = {"delay_conditioning": told, "fuse_projections": True, "base_config": {**PI, "dtype": dtype}}
    plain, recorded = make(base, **options), make(base, **options, cuda_graphs=True)
    calls = []
    function = recorded._pi._recorded
    recorded._pi._recorded = lambda *given, **state: calls.append(state) or function(*given, **state)
    for batch in (2, 1, 3, 2):
        assert torch.equal(chunk(plain, batch, batch), chunk(recorded, batch, batch))
    assert len(calls) == 4
    assert all(state == calls[0] for state in calls), "where the weights are has not changed"


@kinds
def test_the_vision_tower_in_bfloat16(base, make):
    """Which is what the rest computes in; the patches come side by side."""
    options = {"fuse_projections": True, "base_config": {**PI, "dtype": "bfloat16"}}
    wide, narrow = make(base, **options), make(base, **options, vision_dtype="bfloat16")
    seeing = narrow.base.model.paligemma_with_expert.paligemma.model
    for part in (seeing.vision_tower, seeing.multi_modal_projector):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    strides = []
    seeing.vision_tower.get_submodule("vision_model.encoder").register_forward_pre_hook(
        lambda _, __, given: strides.append(given["inputs_embeds"].is_contiguous()), with_kwargs=True
    )
    found, wanted = chunk(narrow), chunk(wide)
    assert strides == [True]
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


def test_alone_the_option_has_the_chunk_computed_here(make):
    assert make("pi05", cuda_graphs=True)._pi.samples
    assert not make("pi05")._pi.samples
    torch.testing.assert_close(chunk(make("pi05", cuda_graphs=True)), chunk(make("pi05")), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign, make):
    policy, other = (make("pi05", cuda_graphs=True, fuse_projections=True) for _ in range(2))
    before = chunk(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    stacked, state = policy._pi._stacked, policy._pi._state()
    policy.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(chunk(policy), chunk(other))
    assert not torch.equal(chunk(policy), before)
    assert policy._pi._stacked is not stacked
    assert not assign or policy._pi._state() != state, "what is copied may lie where it lay"


def test_weights_that_are_written_to_or_moved_are_noticed(make):
    policy = make("pi05", cuda_graphs=True, fuse_projections=True)
    before = chunk(policy)
    stacked, state = policy._pi._stacked, policy._pi._state()
    assert torch.equal(chunk(policy), before)
    assert policy._pi._stacked is stacked
    norm = policy.base.model.paligemma_with_expert.gemma_expert.model.norm
    with torch.no_grad():
        norm.dense.bias.add_(1.0)
    assert not torch.equal(chunk(policy), before)
    assert policy._pi._stacked is not stacked
    moved = policy._pi._state()
    assert moved != state
    policy.to(torch.float64)
    assert policy._pi._state()[2] != moved[2]


def test_a_copy_computes_with_its_own_weights(make):
    policy = make("pi05", cuda_graphs=True, fuse_projections=True)
    before = chunk(policy)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert torch.equal(chunk(other), before)


def test_what_is_guided_is_not_recorded(make):
    policy = make("pi05", cuda_graphs=True, async_mode="rtc")
    calls = []
    function = policy._pi._recorded
    policy._pi._recorded = lambda *given, **state: calls.append(1) or function(*given, **state)
    for tick in range(4):
        policy.select_action(observation(seed=tick))
    assert calls == [1], "the first chunk has nothing to agree with"


def test_others_have_no_such_option():
    with pytest.raises(ValueError, match="cuda_graphs: got True with base='act'"):
        VLASHConfig(base="act", cuda_graphs=True, device="cpu")


def test_it_is_not_trained_by_adapters(make):
    policy = make("pi05", cuda_graphs=True)
    policy.config.base_path = "somewhere"
    with pytest.raises(ValueError, match="cuda_graphs: got True, which is for inference"):
        policy.wrap_with_peft()
