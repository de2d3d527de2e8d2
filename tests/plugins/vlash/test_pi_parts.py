"""Fused projections, modulation of all steps at once, names of weights, and what is made of inputs."""

import copy

import pytest
import torch
from tests.plugins.vlash.networks import PI05_SIZES, branches, network, of_branch, prefix

from pronghorn.vlash.pi.adapt import embed_prefix, pi_model, without_padding
from pronghorn.vlash.pi.fusion import fuse, fuse_state_dict, unfuse, unfuse_state_dict
from pronghorn.vlash.pi.gemma import Residual, after_attention, before_attention, modulation
from pronghorn.vlash.pi.keys import is_authors, lerobot_name, lerobot_weights, vlash_name
from pronghorn.vlash.pi.layers import PiNetwork
from pronghorn.vlash.pi.modulation import StackedModulation, adaptive_norms, modulations
from pronghorn.vlash.pi.normalization import STATISTICS, normalize, unnormalize
from pronghorn.vlash.pi.preprocessing import prompt, resize_with_padding, sincos, state_bins, to_model_range
from pronghorn.vlash.pi.rotation import rotation


def layers_of(net):
    return [*net.language_model.layers, *net.action_expert["model"].layers]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_fused_projections_compute_the_same_and_split_back(kind):
    net, seen, inputs = network(kind, torch.float32), prefix(dtype=torch.float32), branches(2, dtype=torch.float32)
    original = copy.deepcopy(net.state_dict())
    found = pi_model(net).shared_losses(seen, **inputs)
    one = of_branch(inputs, 0)
    sampled = pi_model(net).sample(seen, one["state"], one["noise"], 2)
    fuse(layers_of(net))
    fuse(layers_of(net))
    assert not any(name.endswith((".q_proj.weight", ".up_proj.weight")) for name in net.state_dict())
    torch.testing.assert_close(pi_model(net).shared_losses(seen, **inputs), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pi_model(net).sample(seen, one["state"], one["noise"], 2), sampled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(net.state_dict()), fuse_state_dict(original), rtol=0, atol=0)
    torch.testing.assert_close(unfuse_state_dict(net.state_dict()), dict(original), rtol=0, atol=0)
    unfuse(layers_of(net))
    unfuse(layers_of(net))
    torch.testing.assert_close(dict(net.state_dict()), dict(original), rtol=0, atol=0)
    assert torch.equal(pi_model(net).shared_losses(seen, **inputs), found)


def test_fusing_keeps_what_is_frozen_and_biases():
    net = network("pi05", torch.bfloat16)
    net.language_model.requires_grad_(False)
    attention = net.language_model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        old = getattr(attention, name)
        setattr(attention, name, torch.nn.Linear(old.in_features, old.out_features, dtype=torch.bfloat16))
        getattr(attention, name).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    fuse(layers_of(net))
    assert not any(parameter.requires_grad for parameter in net.language_model.parameters())
    assert all(parameter.requires_grad for parameter in net.action_expert.parameters())
    assert attention.qkv_proj.bias.dtype == torch.bfloat16
    unfuse(layers_of(net))
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in net.language_model.parameters())


def test_a_vision_tower_is_not_fused():
    names = [f"vision_tower.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    assert list(fuse_state_dict({name: torch.zeros(2, 2) for name in names})) == names


def test_what_cannot_be_fused_is_refused():
    net = network("pi05")
    net.language_model.layers[0].self_attn.v_proj = torch.nn.Identity()
    with pytest.raises(TypeError, match="Identity"):
        fuse(layers_of(net))
    with pytest.raises(ValueError, match=r"without a\.k_proj\.weight, a\.v_proj\.weight"):
        fuse_state_dict({"a.q_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"a\.o_proj\.weight"):
        unfuse_state_dict({"a.qkv_proj.weight": torch.zeros(6, 2)})


def test_all_steps_of_all_norms_at_once():
    norms = adaptive_norms(network("pi05").action_expert["model"])
    conditions = torch.randn(3, 2, PI05_SIZES.width).double()
    assert len(norms) == 2 * PI05_SIZES.depth + 1
    for made in (modulations(norms, conditions), StackedModulation(norms)(conditions, conditions.dtype)):
        assert len(made) == 3
        for step, condition in zip(made, conditions, strict=True):
            for norm, found in zip(norms, step, strict=True):
                torch.testing.assert_close(found, modulation(norm, condition), rtol=1e-12, atol=1e-12)


def test_projections_inside_of_lora_are_not_stacked():
    norms = adaptive_norms(network("pi05").action_expert["model"])
    norms[1].dense = torch.nn.Sequential(norms[1].dense)
    with pytest.raises(TypeError, match="Sequential"):
        StackedModulation(norms)
    assert len(modulations(norms, torch.zeros(1, 1, PI05_SIZES.width).double())[0]) == len(norms)


def test_names_go_there_and_back():
    net = PiNetwork(PI05_SIZES, state_cond=True, max_delay_steps=2)
    theirs = [f"model.{name}" for name in net.state_dict()]
    for prefixed in (True, False):
        ours = [lerobot_name(name, prefixed=prefixed) for name in theirs]
        assert all(name.startswith("model.") == prefixed for name in ours)
        assert [vlash_name(name) for name in ours] == theirs
    assert is_authors(theirs)
    assert not is_authors(ours)
    for alias, plain in {
        "layers.3.self_attn.vlm_attention.qkv_proj": "vlm.model.language_model.layers.3.self_attn.qkv_proj",
        "layers.12.mlp.action_expert_mlp.up_proj": "action_expert.model.layers.12.mlp.up_proj",
        "prefix_embedder.lang_embedder": "vlm.model.language_model.embed_tokens",
    }.items():
        assert lerobot_name(f"model.{alias}.weight") == lerobot_name(f"model.{plain}.weight")
    twice = {f"model.{name}.weight": torch.zeros(1) for name in (alias, plain)}
    with pytest.raises(ValueError, match="the same weight under another name"):
        lerobot_weights(twice)
    beginning = "paligemma_with_expert.gemma_expert.model.norm.dense.weight"
    assert lerobot_name("model.action_expert.model.norm.dense.weight") == f"model.{beginning}"
    assert lerobot_name("model.suffix_embedder.state_mlp_in.bias", prefixed=False) == "state_mlp_in.bias"
    assert vlash_name(beginning) == vlash_name(f"model.{beginning}")
    for function in (vlash_name, lerobot_name):
        with pytest.raises(ValueError, match=r"name: got 'elsewhere\.weight'"):
            function("elsewhere.weight")


@pytest.mark.parametrize("mode", STATISTICS)
def test_normalising_and_back(mode):
    x = torch.randn(5, 3).double()
    statistics = {name: torch.tensor([0.5, -1.0, 2.0]) for name in ("mean", "min", "q01", "q10")}
    statistics |= {name: torch.tensor([1.5, 2.0, 2.5]) for name in ("std", "max", "q99", "q90")}
    there = normalize(x, statistics, mode)
    assert there.dtype == torch.float64
    torch.testing.assert_close(unnormalize(there, statistics, mode), x, rtol=1e-7, atol=1e-7)
    if mode not in ("IDENTITY", "MEAN_STD"):
        ends = torch.stack([statistics[name] for name in STATISTICS[mode]])
        torch.testing.assert_close(normalize(ends, statistics, mode), torch.tensor([[-1.0] * 3, [1.0] * 3]))
    if mode != "IDENTITY":
        with pytest.raises(ValueError, match=f"{mode} wants {STATISTICS[mode][1]}"):
            normalize(x, {STATISTICS[mode][0]: x[0]}, mode)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: got 'MAX'"):
        normalize(torch.zeros(1), {}, "MAX")


def test_images_are_centred_or_pushed_to_the_right_and_down():
    images = torch.rand(2, 3, 8, 20)
    corner, centred = (resize_with_padding(images, 10, 10, centred=centred) for centred in (False, True))
    assert corner.shape == centred.shape == (2, 3, 10, 10)
    assert not corner[:, :, :6].any()
    assert torch.equal(corner[:, :, 6:], centred[:, :, 3:7])
    assert not centred[:, :, :3].any()
    assert not centred[:, :, 7:].any()
    assert torch.equal(resize_with_padding(images, 8, 20), images)
    assert to_model_range(torch.tensor([0.0, 1.0])).tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="images: got shape"):
        resize_with_padding(images[0], 10, 10)
    with pytest.raises(TypeError, match="uint8"):
        resize_with_padding(images.to(torch.uint8), 10, 10)


def test_states_are_told_in_words():
    bins = state_bins(torch.tensor([[-3.0, -1.0, 0.0, 0.001, 1.0, 9.0]]))
    assert bins.tolist() == [[-1, -1, 127, 128, 255, 255]]
    assert prompt(" pick_the\ncup ", bins[0, 2:4].tolist()) == "Task: pick the cup, State: 127 128;\nAction: "
    assert prompt("pick") == "Task: pick;\nAction: "


def test_times_become_waves():
    time = torch.tensor([0.0, 0.004, 0.5])
    found = sincos(time, 4)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0, 1.0]).double())
    torch.testing.assert_close(found[1, 2], torch.tensor(1.0).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[2, 1], torch.sin(torch.tensor(torch.pi / 4)).double())
    with pytest.raises(ValueError, match="width: got 3"):
        sincos(time, 3)


def test_quantized_layers_do_not_tell_their_dtype():
    net = network("pi05", torch.float32)
    attention = net.action_expert["model"].layers[0].self_attn
    attention.o_proj.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="dtype: got None"):
        pi_model(net)
    assert pi_model(net, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_model_without_cameras_is_refused():
    with pytest.raises(ValueError, match="images: got none"):
        embed_prefix(torch.nn.Module(), [], [], torch.zeros(1, 1), torch.ones(1, 1))


def test_padding_at_the_end_is_left_out():
    tokens = torch.arange(20).reshape(2, 10)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    for step, kept in ((1, 5), (4, 8), (32, 10)):
        found = without_padding(tokens, mask, step)
        assert torch.equal(found[0], tokens[:, :kept])
        assert torch.equal(found[1], mask[:, :kept])
    assert without_padding(tokens, torch.zeros_like(mask), 4)[0].shape == (2, 4)


def test_a_layer_by_its_formulas():
    sizes = PI05_SIZES
    layer = network("pi0").action_expert["model"].layers[0]
    x, attended = torch.randn(2, 3, sizes.width).double(), torch.randn(2, 3, sizes.heads, sizes.head_dim).double()
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    frequencies = 100.0 ** (-torch.arange(0, 1, 2 / sizes.head_dim)).double()
    attending = before_attention(layer, Residual(x), rotation(positions, frequencies, torch.float64))

    def norm(of, weight):
        return of / (of.square().mean(-1, keepdim=True) + sizes.eps).sqrt() * (1 + weight)

    normed = norm(x, layer.input_layernorm.weight)
    query = (normed @ layer.self_attn.q_proj.weight.T).unflatten(-1, (sizes.heads, sizes.head_dim))
    pairs = torch.complex(*query.chunk(2, dim=-1)) * torch.exp(1j * positions[..., None] * frequencies)[:, :, None]
    torch.testing.assert_close(attending.query, torch.cat([pairs.real, pairs.imag], dim=-1))
    torch.testing.assert_close(attending.value.flatten(2), normed @ layer.self_attn.v_proj.weight.T)

    found = after_attention(layer, attending, attended)
    total = x + attended.flatten(2) @ layer.self_attn.o_proj.weight.T
    normed = norm(total, layer.post_attention_layernorm.weight)
    gate, up = normed @ layer.mlp.gate_proj.weight.T, normed @ layer.mlp.up_proj.weight.T
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(found.x, total)
    torch.testing.assert_close(found.update, (gelu * up) @ layer.mlp.down_proj.weight.T)
    assert found.gate is None
