"""Our passes over LeRobot's own pi0 and pi0.5 give what LeRobot's give."""

import copy
from types import SimpleNamespace

import pytest
import torch

from pronghorn.vlash.pi.adapt import embed_prefix, pi_model
from pronghorn.vlash.pi.fusion import fuse, unfuse
from pronghorn.vlash.pi.modulation import StackedModulation, adaptive_norms
from pronghorn.vlash.pi.suffix import add_delay_condition, add_state_condition

HORIZON, WIDTH, STEPS = 6, 8, 4
kinds = pytest.mark.parametrize("kind", ["pi0", "pi05"])


@pytest.fixture
def build(tiny_pi):
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    def built(kind, dtype="float32"):
        config, model = {"pi0": (PI0Config, PI0Pytorch), "pi05": (PI05Config, PI05Pytorch)}[kind]
        torch.manual_seed(0)
        made = model(
            config(device="cpu", dtype=dtype, chunk_size=HORIZON, n_action_steps=HORIZON, max_action_dim=WIDTH,
                   max_state_dim=WIDTH, image_resolution=(28, 28), num_inference_steps=STEPS)
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "embed_tokens" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return made.eval()

    return built


@pytest.fixture
def seen():
    generator = torch.Generator().manual_seed(1)
    shape = (2, HORIZON, WIDTH)
    return SimpleNamespace(
        images=[torch.rand(2, 3, 28, 28, generator=generator) * 2 - 1 for _ in range(2)],
        image_masks=[torch.tensor([True, True]), torch.tensor([True, False])],
        tokens=torch.randint(0, 100, (2, 7), generator=generator),
        token_mask=torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),
        state=torch.randn(2, WIDTH, generator=generator), time=torch.rand(2, generator=generator),
        actions=torch.randn(shape, generator=generator), noise=torch.randn(shape, generator=generator),
    )  # fmt: skip


def theirs(model, seen):
    return seen.images, seen.image_masks, seen.tokens, seen.token_mask, *([seen.state] if is_pi0(model) else [])


def is_pi0(model):
    return hasattr(model, "state_proj") and not hasattr(model, "state_mlp_in")


def ours(model, seen):
    return embed_prefix(model, *theirs(model, seen)[:4])


def compared(model, seen, **tolerance):
    """Losses and chunks of both."""
    wanted = model.forward(*theirs(model, seen), seen.actions, seen.noise, seen.time)
    found = pi_model(model).losses(ours(model, seen), seen.state, seen.actions, seen.noise, seen.time)
    torch.testing.assert_close(found, wanted, **tolerance)
    chunk = model.sample_actions(*theirs(model, seen), noise=seen.noise)
    sampled = pi_model(model).sample(ours(model, seen), seen.state, seen.noise, STEPS)
    torch.testing.assert_close(sampled, chunk, **tolerance)
    assert (chunk - seen.noise).std() > 0.1
    return wanted, found


@kinds
def test_forward_sample_and_gradients(kind, build, seen):
    model = build(kind)
    wanted, found = compared(model, seen, rtol=1e-4, atol=1e-5)
    grads = []
    for losses in (wanted, found):
        model.zero_grad()
        losses.mean().backward()
        grads.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        )
    assert grads[0].keys() == grads[1].keys()
    assert any("vision_tower" in name for name in grads[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@kinds
def test_with_gradient_checkpointing(kind, build, seen):
    model = build(kind)
    before = pi_model(model).losses(ours(model, seen), seen.state, seen.actions, seen.noise, seen.time)
    model.gradient_checkpointing_enable()
    model.train()
    assert pi_model(model).gradient_checkpointing
    after = pi_model(model).losses(ours(model, seen), seen.state, seen.actions, seen.noise, seen.time)
    torch.testing.assert_close(after, before)
    after.mean().backward()
    assert model.action_in_proj.weight.grad.any()
    model.eval()
    assert not pi_model(model).gradient_checkpointing


@kinds
def test_in_bfloat16(kind, build, seen):
    """As LeRobot keeps it: norms, and what makes the suffix, in float32."""
    model = build(kind, "bfloat16")
    assert pi_model(model).dtype == torch.bfloat16
    compared(model, seen, rtol=0.1, atol=0.1)


@kinds
def test_inside_of_lora(kind, build, seen):
    from peft import LoraConfig, inject_adapter_in_model

    model = build(kind)
    pi = pi_model(model)
    plain = pi.losses(ours(model, seen), seen.state, seen.actions, seen.noise, seen.time).detach()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "action_in_proj"]
    saved = ["action_out_proj", "input_layernorm", "post_attention_layernorm"]
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=names, modules_to_save=saved, init_lora_weights=False), model
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    wanted, found = compared(model, seen, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, plain, rtol=1e-2, atol=1e-2)
    again = pi.losses(ours(model, seen), seen.state, seen.actions, seen.noise, seen.time)
    torch.testing.assert_close(again, found)  # seen before the adapters were there
    found.mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for part in ("lora_A", "lora_B", "modules_to_save"):
        assert any(part in name for name in trained)
    with pytest.raises(TypeError, match="merge first"):
        fuse(pi.expert.layers)


@kinds
def test_fused_and_stacked(kind, build, seen):
    model = build(kind)
    state = copy.deepcopy(model.state_dict())
    pi = pi_model(model)
    wanted = model.sample_actions(*theirs(model, seen), noise=seen.noise)
    layers = [*pi.prefix_expert.layers, *pi.expert.layers]
    fuse(layers)
    stacked = StackedModulation(adaptive_norms(pi.expert)) if kind == "pi05" else None
    found = pi.sample(ours(model, seen), seen.state, seen.noise, STEPS, stacked=stacked)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    unfuse(layers)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert torch.equal(model.sample_actions(*theirs(model, seen), noise=seen.noise), wanted)


@kinds
def test_new_conditions_start_without_effect(kind, build, seen):
    model = build(kind)
    arguments = (seen.state, seen.actions, seen.noise, seen.time)
    before = pi_model(model).losses(ours(model, seen), *arguments)
    if kind == "pi05":
        add_state_condition(model, WIDTH)
    add_delay_condition(model, 3)
    delay = torch.tensor([0, 3])
    assert torch.equal(pi_model(model).losses(ours(model, seen), *arguments, delay), before)
    torch.nn.init.normal_(model.delay_embedding.weight)
    assert not torch.allclose(pi_model(model).losses(ours(model, seen), *arguments, delay), before)
    shared = pi_model(model).shared_losses(
        ours(model, seen), *(part[:, None].expand(-1, 4, *part.shape[1:]) for part in arguments),
        delay=torch.arange(4).expand(2, 4),
    )  # fmt: skip
    one = pi_model(model).losses(ours(model, seen), *arguments, torch.tensor([3, 3]))
    torch.testing.assert_close(shared[:, 3], one, rtol=1e-4, atol=1e-5)
