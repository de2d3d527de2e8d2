"""DiT as a diffusers model: one embedding for all blocks, saved once, and diffusers' own in what it computes."""

import copy

import diffusers
import pytest
import torch
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_uvit import graphs_of_blocks

from pronghorn.dcae import DiT2DModel

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "num_layers": 3, "sample_size": 4,
        "num_embeds_ada_norm": 5}  # fmt: skip


def tiny(**changes):
    """A model whose gates and last layer are not 0, as they are at the start."""
    model = DiT2DModel(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def given():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 4, 4, generator=generator), torch.tensor([3, 700]), torch.tensor([0, 5])


def embedding(model, block):
    return model.transformer_blocks[block].norm1.emb


def test_published_size():
    with torch.device("meta"):
        model = DiT2DModel()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(674.89, abs=0.005)
    assert model.config.out_channels == 64
    assert model.num_classes == 1000


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = DiT2DModel.from_pretrained(tmp_path)
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(model(*given()).sample, other(*given()).sample)
        assert embedding(other, 2) is embedding(other, 0)
        assert embedding(other, 2) is not embedding(model, 0)
    assert again.state_dict().keys() == model.state_dict().keys() == dict(again.named_parameters()).keys()
    assert sum("embedder" in name for name in again.state_dict()) == 5


@torch.no_grad()
def test_computes_what_diffusers_own_does():
    ours = tiny()
    stock = diffusers.DiTTransformer2DModel(**{**TINY, "patch_size": 1, "out_channels": 16, "norm_eps": 1e-6}).eval()
    state = ours.state_dict()
    for name in stock.state_dict():
        if ".emb." in name:
            state[name] = state["transformer_blocks.0." + name.split(".", 2)[2]]
    stock.load_state_dict(state)
    for block in range(3):
        embedding(stock, block).time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(ours(*given()).sample, stock(*given()).sample)


def test_blocks_compile_as_one():
    assert len(graphs_of_blocks(tiny(num_layers=5), *given())) == 2  # the first block's input lies otherwise in memory


def test_frequencies_of_times():
    found = embedding(tiny(), 0).time_proj(torch.tensor([3, 700]))
    angles = torch.tensor([3, 700])[:, None] * 10000 ** (-torch.arange(128) / 128)
    torch.testing.assert_close(found, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=1e-4, atol=1e-4)


def test_training_starts_from_nothing_and_drops_no_label():
    torch.manual_seed(0)
    model = DiT2DModel(**TINY).train()
    assert model(*given()).sample.abs().max() == 0
    tokens = torch.randn(2, 16, 16)
    times, labels = given()[1:]
    assert torch.equal(model.transformer_blocks[1](tokens, timestep=times, class_labels=labels), tokens)
    model, labels = tiny().train(), torch.zeros(64, dtype=torch.int64)
    found = model(given()[0][:1].expand(64, -1, -1, -1), torch.full((64,), 3), labels).sample
    torch.testing.assert_close(found, found[:1].expand_as(found))
    found.square().mean().backward()
    assert embedding(model, 0).class_embedder.embedding_table.weight.grad[0].abs().max() > 0


def test_diffusers_own_pipeline_runs_it(tmp_path):
    transformer = tiny(num_embeds_ada_norm=1000)  # it knows no other number
    pipe = diffusers.DiTPipeline(
        transformer, small(scaling_factor=0.5), diffusers.DDIMScheduler(timestep_spacing="linspace")
    )
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    pictures = []
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        pictures.append(each([207, 3], num_inference_steps=3, generator=seed, output_type="pt").images)
    assert pictures[0].shape == (2, 3, 8, 8)
    assert torch.equal(*pictures)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="patch_size: got 3, wanted a divisor of 4"):
        DiT2DModel(**TINY, patch_size=3)
