"""`pronghorn check --for diffusers`: pipelines in the precision that they are stored in."""

import json

import diffusers
import pytest
import torch
import transformers
from tests.integrations.checked import found

from pronghorn.cli.check import verdict


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """A tiny Stable Diffusion in bfloat16."""
    folder = tmp_path_factory.mktemp("painter")
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                    down_block_types=["DownEncoderBlock2D"] * 2,
                                    up_block_types=["UpDecoderBlock2D"] * 2),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=4, **text)),
        tokenizer=transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                             model_max_length=77),
        unet=diffusers.UNet2DConditionModel(block_out_channels=(8, 16), layers_per_block=1, sample_size=32,
                                            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
                                            cross_attention_dim=32, attention_head_dim=4),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None,
    )  # fmt: skip
    pipe.to(torch.bfloat16).save_pretrained(folder / "pipe")
    return folder / "pipe"


def test_a_pipeline_of_half_precision_makes_a_picture(painter):
    findings = found(painter, "diffusers", source=str(painter))
    assert [one for one in findings.values() if one.state != "ok"] == []
    assert verdict(findings.values()) == "can be shipped"
    assert "relative error 0.000000" in findings["as the source"].detail


def test_a_model_that_makes_no_picture_is_not_proved(painter):
    findings = found(painter / "unet", "diffusers", source=str(painter / "unet"))
    assert findings["answers"].state == findings["as the source"].state == "skipped"
    assert verdict(findings.values()).startswith("not proved here: answers (UNet2DConditionModel takes neither")
