"""A vision tower's joined products, against the tower as transformers has it."""

import copy

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from pronghorn.vlash.pi.vision import JoinedAttention, PatchProjection, join_products


@pytest.fixture
def tower():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7,
        vision_use_head=False,
    )  # fmt: skip
    return SiglipVisionModel(config).double().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).double()


def vision_of(tower):
    return getattr(tower, "vision_model", tower)


def products(tower, images):
    """How many linear maps of [patches, 24] numbers a pass takes."""
    seen = []
    hooks = [module.register_forward_hook(lambda *_: seen.append(1)) for module in tower.modules()
             if type(module) is nn.Linear]  # fmt: skip
    with torch.no_grad():
        tower(images)
    for hook in hooks:
        hook.remove()
    return len(seen)


def test_it_sees_the_same(tower, images):
    with torch.no_grad():
        wanted, state = tower(images).last_hidden_state, copy.deepcopy(tower.state_dict())
        before = products(tower, images)
        join_products(tower)
        torch.testing.assert_close(tower(images).last_hidden_state, wanted)
    found = tower.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert products(tower, images) == before - 2 * 3, "queries, keys and values of two layers are no products of theirs"


def test_patches_come_side_by_side(tower, images):
    embeddings = vision_of(tower).embeddings
    wanted = embeddings(images)
    join_products(tower)
    assert type(embeddings.patch_embedding) is PatchProjection
    patches = embeddings(images)
    assert patches.is_contiguous()
    torch.testing.assert_close(patches, wanted)


def test_of_an_image_that_patches_do_not_divide_the_rest_is_left():
    convolution = nn.Conv2d(3, 5, (4, 3), stride=(4, 3)).double()
    images = torch.randn(2, 3, 11, 13).double()
    torch.testing.assert_close(PatchProjection(convolution)(images), convolution(images))


def test_joined_again_after_a_move(tower, images):
    join_products(tower)
    joined = products(tower, images)
    tower.float().double()
    assert products(tower, images) > joined
    join_products(tower)
    assert products(tower, images) == joined


def test_weights_that_are_loaded_are_used(tower, images):
    join_products(tower)
    state = {name: value + 0.1 for name, value in tower.state_dict().items()}
    other = copy.deepcopy(tower)
    for way in (tower, other):
        way.load_state_dict(state, assign=way is other)
    with torch.no_grad():
        torch.testing.assert_close(tower(images).last_hidden_state, other(images).last_hidden_state)
    torch.testing.assert_close(tower.state_dict(), state)


def test_where_weights_were_moved_each_takes_its_own_product(tower, images):
    with torch.no_grad():
        wanted = tower(images).last_hidden_state
    before = products(tower, images)
    join_products(tower)
    tower.float().double()
    assert products(tower, images) == before
    with torch.no_grad():
        torch.testing.assert_close(tower(images).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_weight(tower, images):
    tower(images).last_hidden_state.square().sum().backward()
    wanted = {name: part.grad.clone() for name, part in tower.named_parameters() if part.grad is not None}
    tower.zero_grad()
    join_products(tower)
    tower(images).last_hidden_state.square().sum().backward()
    torch.testing.assert_close({name: tower.get_parameter(name).grad for name in wanted}, wanted)


def test_layers_that_are_adapted_are_left(tower):
    attention = vision_of(tower).encoder.layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    join_products(tower)
    assert vision_of(tower).encoder.layers[1].self_attn is attention
    assert type(vision_of(tower).encoder.layers[0].self_attn) is JoinedAttention


def test_saved_and_read_again(tower, images, tmp_path):
    from safetensors.torch import load_file, save_model

    join_products(tower)
    save_model(tower, str(tmp_path / "tower.safetensors"))
    torch.testing.assert_close(load_file(tmp_path / "tower.safetensors"), dict(tower.state_dict()))
