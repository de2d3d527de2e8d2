"""diffusers' own Sana pipeline with an accelerated autoencoder, whole and in tiles."""

import diffusers
import pytest
import torch
from tests.plugins.dcae.test_tiling import model

from pronghorn.dcae import accelerate_dcae


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    made = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=model("sana"), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def test_sana_gives_the_same_picture(pipe):
    words, mask = torch.randn(1, 4, 8, generator=torch.manual_seed(1)), torch.ones(1, 4)

    def picture():
        return pipe(
            prompt_embeds=words, prompt_attention_mask=mask, negative_prompt=None, negative_prompt_embeds=words * 0,
            negative_prompt_attention_mask=mask, num_inference_steps=2, height=64, width=96, output_type="pt",
            generator=torch.manual_seed(0), use_resolution_binning=False,
        ).images  # fmt: skip

    wanted = picture()
    assert wanted.shape == (1, 3, 64, 96)
    with accelerate_dcae(pipe.vae):
        torch.testing.assert_close(picture(), wanted, rtol=1e-4, atol=2e-5)
        pipe.vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
        torch.testing.assert_close(picture(), wanted, rtol=1e-4, atol=2e-5)
    pipe.vae.disable_tiling()
    assert torch.equal(picture(), wanted)
