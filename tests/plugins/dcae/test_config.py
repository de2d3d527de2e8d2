"""Architectures: the published ones, the official code's options, and what is refused."""

import json

import pytest
import torch

from pronghorn.dcae import CONFIGURATIONS, AutoencoderDC, DCAEConfig, published
from pronghorn.dcae.options import from_options

# Millions of parameters, in all and of the encoder, as published.
PARAMETERS = {
    "dc-ae-f32c32-in-1.0": (323.36, 123.17), "dc-ae-f64c128-in-1.0": (676.90, 264.55),
    "dc-ae-f128c512-in-1.0": (1120.68, 415.66), "dc-ae-f32c32-sana-1.0": (312.25, 153.03),
    "dc-ae-lite-f32c32": (421.18, 153.03), "dc-ae-f32c128-1.5": (523.61, 228.61), "dc-ae-f64c128-1.5": (714.74, 306.48),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_size(name):
    with torch.device("meta"):
        model = AutoencoderDC.from_published(name)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.encoder)]
    assert sizes == pytest.approx(PARAMETERS[name], abs=0.005)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_published_models_are_found_by_any_name(name):
    assert published(f"mit-han-lab/{name}-diffusers") is CONFIGURATIONS[name]
    ratio = CONFIGURATIONS[name].spatial_compression_ratio
    assert f"f{ratio}c" in name
    assert DCAEConfig.from_dict(json.loads(json.dumps(CONFIGURATIONS[name].to_dict()))) == CONFIGURATIONS[name]


def test_options_of_the_official_code():
    text = (
        "latent_channels=32 encoder.block_type=[ResBlock,ResBlock,ResBlock,EViT_GLU,EViT_GLU,EViT_GLU] "
        "encoder.width_list=[128,256,512,512,1024,1024] encoder.depth_list=[0,4,8,2,2,2] "
        "decoder.block_type=[ResBlock,ResBlock,ResBlock,EViT_GLU,EViT_GLU,EViT_GLU] "
        "decoder.width_list=[128,256,512,512,1024,1024] decoder.depth_list=[0,5,10,2,2,2] "
        "decoder.norm=[bn2d,bn2d,bn2d,trms2d,trms2d,trms2d] decoder.act=[relu,relu,relu,silu,silu,silu]"
    )
    assert from_options(text) == DCAEConfig()
    for wrong, match in (
        (text + " encoder.dropout=1", "unknown are"),
        (text.replace("latent_channels=32 ", ""), "missing"),
        (text.replace("bn2d", "ln"), r"decoder\.norm: got 'ln'"),
        (text.replace("ResBlock", "ViT"), r"encoder\.block_type: got 'ViT'"),
    ):
        with pytest.raises(ValueError, match=match):
            from_options(wrong)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"latent_channels": 0}, "latent_channels: got 0"),
        ({"latent_channels": 33}, "do not divide into 33"),
        ({"encoder_block_types": ("ResBlock",)}, "encoder_block_types: got"),
        ({"decoder_act_fns": ("gelu",) * 6}, "decoder_act_fns: got 'gelu'"),
        ({"decoder_layers_per_block": (0, 5, 0, 2, 2, 2)}, "decoder_layers_per_block"),
        ({"encoder_qkv_multiscales": ((4,),) * 6}, r"encoder_qkv_multiscales: got \(4,\)"),
        ({"decoder_block_out_channels": (0,) * 6}, "decoder_block_out_channels: got"),
        ({"downsample_block_type": "pool"}, "downsample_block_type: got 'pool'"),
        ({"latent_channels_list": (64,)}, "latent_channels_list: got"),
        ({"scaling_factor": 0.0}, "scaling_factor: got 0.0"),
        ({"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1000)}, "do not divide into 1000"),
    ],
)
def test_bad_architectures_are_named(values, match):
    with pytest.raises(ValueError, match=match):
        DCAEConfig(**values)


def test_unknown_names():
    with pytest.raises(ValueError, match="known are dc-ae-f32c32-in"):
        published("dc-ae-f8c4")
    with pytest.raises(ValueError, match="width: no setting"):
        DCAEConfig.from_dict({"width": 3})
