"""Tiles together are what the whole is, whatever their size, and take less memory."""

import diffusers
import pytest
import torch
from tests.plugins.dcae.test_acceleration import lively, stock
from tests.plugins.dcae.test_autoencoder import ADAPTIVE, small
from torch.utils._python_dispatch import TorchDispatchMode

from pronghorn.dcae import AutoencoderDC, DCAEConfig
from pronghorn.dcae.diffusers import accelerate_dcae, stream_decode, tiled_decode, tiled_encode

DEEP = {
    "attention_head_dim": 8, "latent_channels": 8, "encoder_block_out_channels": (8, 8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 8, 16, 16),
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 2,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 2, "encoder_layers_per_block": (0, 1, 2, 1, 1),
    "decoder_layers_per_block": (0, 1, 2, 1, 1), "encoder_qkv_multiscales": ((), (), (), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), ()), "decoder_norm_types": ("batch_norm",) * 2 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 2 + ("silu",) * 3,
}  # fmt: skip
KINDS = {
    "in": {},
    "sana": {"downsample_block_type": "conv", "upsample_block_type": "interpolate",
             "encoder_layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5},
    "residual blocks alone": {"encoder_block_types": ("ResBlock",) * 5, "decoder_block_types": ("ResBlock",) * 5,
                              "encoder_qkv_multiscales": ((),) * 5, "decoder_qkv_multiscales": ((),) * 5,
                              "encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "attention on fine grids": {"decoder_block_types": ("ResBlock", "EfficientViTBlock", *("ResBlock",) * 3),
                                "encoder_block_types": ("ResBlock", "EfficientViTBlock", *("ResBlock",) * 3)},
}  # fmt: skip


def model(kind):
    values = DCAEConfig(**{**DEEP, **KINDS[kind]}).to_dict()
    del values["latent_channels_list"], values["stage_shortcuts"]
    torch.manual_seed(0)
    return lively(diffusers.AutoencoderDC(**values)).eval()


def image(height, width):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [16, 48])
@pytest.mark.parametrize("size", [(80, 112), (16, 96)])
def test_tiles_are_the_whole(kind, tile, size):
    vae, x = model(kind), image(*size)
    latent = vae.encode(x).latent
    torch.testing.assert_close(tiled_encode(vae, x, tile=tile), latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiled_decode(vae, latent, tile=tile), vae.decode(latent).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_tiles_are_the_whole_too(kind):
    vae, x = model(kind), image(64, 96)
    latent = vae.encode(x).latent
    wanted = vae.decode(latent).sample
    with accelerate_dcae(vae):
        torch.testing.assert_close(tiled_encode(vae, x, tile=32), latent, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(tiled_decode(vae, latent, tile=32), wanted, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", ["ours", "stock, accelerated"])
def test_enable_tiling_is_exact(make):
    vae, x = model("in"), image(64, 80)
    latent = vae.encode(x).latent
    wanted = vae.decode(latent).sample
    if make == "ours":
        state = vae.state_dict()
        vae = AutoencoderDC(**DCAEConfig(**DEEP).to_dict()).eval()
        vae.load_state_dict(state)
    else:
        handle = accelerate_dcae(vae)
    vae.enable_tiling(tile_sample_min_height=40, tile_sample_min_width=48, tile_sample_stride_height=37)
    torch.testing.assert_close(vae.encode(x).latent, latent, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(vae.decode(latent).sample, wanted, rtol=1e-4, atol=2e-5)
    if make != "ours":
        handle.restore()
        assert vae.tiled_decode.__func__ is diffusers.AutoencoderDC.tiled_decode


@torch.no_grad()
def test_tiles_come_in_order_and_fit_the_edge():
    vae = model("in")
    z = torch.randn(1, 8, 3, 5)
    found = [(top, left, tuple(part.shape[2:])) for top, left, part in stream_decode(vae, z, tile=32)]
    assert found == [(0, 0, (32, 32)), (0, 32, (32, 32)), (0, 64, (32, 16)), (32, 0, (16, 32)), (32, 32, (16, 32)),
                     (32, 64, (16, 16))]  # fmt: skip


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@torch.no_grad()
def test_no_tensor_is_as_large_as_a_whole_layer():
    vae, x = model("in"), image(256, 256)
    with Largest() as whole:
        latent = vae.encode(x).latent
        vae.decode(latent)
    with Largest() as tiled:
        tiled_encode(vae, x, tile=32)
        for _ in stream_decode(vae, latent, tile=32):
            pass
    assert tiled.size <= max(whole.size / 4, x.numel())


def test_bad_input_is_named():
    vae = model("in")
    with pytest.raises(ValueError, match="tile: got 40, wanted a multiple of 16"):
        tiled_decode(vae, torch.zeros(1, 8, 2, 2), tile=40)
    with pytest.raises(ValueError, match="with multiples of 16"):
        tiled_encode(vae, image(24, 32))
    with pytest.raises(ValueError, match="training mode"):
        tiled_decode(vae.train(), torch.zeros(1, 8, 2, 2))


def ways(vae):
    """All that take images, and all that take latents."""
    encoders = [vae.encode, lambda x: tiled_encode(vae, x, tile=4)]
    return encoders, [vae.decode, lambda z: tiled_decode(vae, z, tile=4), lambda z: stream_decode(vae, z, tile=4)]


@torch.no_grad()
@pytest.mark.fault(4)
@pytest.mark.fault(5)
@pytest.mark.parametrize("make", [small, stock])
def test_what_does_not_fit_is_named_in_every_way(make):
    """Before anything is computed; of a stock model, what is fast does so."""
    x, z = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 4, 4)
    with accelerate_dcae(make()) as fast:
        plain = [make()] if make is small else []
        for vae in (fast.vae, *plain):
            for given, calls in zip((x, z), ways(vae), strict=True):
                name, few = ("x", "z")[given is z], (r"\[batch, 3, height", "got 5 latent channels")[given is z]
                other = torch.zeros(1, 5, *given.shape[2:])
                for call in calls:
                    for wrong, match in (
                        (other, few), (given[0], rf"{name}: got .*wanted \[batch, "), (given[:0], "at least one"),
                        (given[..., :0], "at least one"), (given.double(), rf"{name}: got torch.float64, wanted .*32"),
                        (given.bfloat16(), rf"{name}: got torch.bfloat16"),
                    ):  # fmt: skip
                        with pytest.raises(ValueError, match=match):
                            call(wrong)
    for call in (*ways(diffusers.VQModel().eval())[0][1:], *ways(diffusers.VQModel().eval())[1][1:]):
        with pytest.raises(TypeError, match="vae: got VQModel, wanted an AutoencoderDC"):
            call(z)


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_the_first_channels_of_an_adaptive_latent_are_decoded_in_every_way(fast):
    vae = lively(small(**ADAPTIVE))
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    wanted = vae.decode(z).sample
    handle = accelerate_dcae(vae) if fast else None
    parts = [part for *_, part in stream_decode(vae, z, tile=4)]
    vae.enable_tiling(tile_sample_min_height=4, tile_sample_min_width=4)
    for found in (vae.decode(z).sample, tiled_decode(vae, z, tile=4)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(parts[0], wanted[..., :4, :4], rtol=1e-4, atol=2e-5)
    if handle is not None:
        handle.restore()
