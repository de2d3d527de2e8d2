"""DC-AE's checkpoints and latents: tiny files of each, and how they are read."""

import torch
from tests.faults.loaders.table import loader, tensors


def _autoencoder_sizes():
    from tests.plugins.dcae.test_autoencoder import SMALL

    widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4), "attention_head_dim": 4}
    return {**SMALL, **widths, "latent_channels": 4}


def _autoencoder():
    from pronghorn.dcae import AutoencoderDC, DCAEConfig

    torch.manual_seed(0)
    return AutoencoderDC(**DCAEConfig(**_autoencoder_sizes()).to_dict()).eval()


@loader("dcae, official layout", "model.safetensors", "config.json")
class DcaeOfficial:
    @staticmethod
    def write(folder):
        _autoencoder().save_efficientvit(folder, model_name="tiny")

    @staticmethod
    def read(folder):
        from pronghorn.dcae import CONFIGURATIONS, AutoencoderDC, DCAEConfig

        CONFIGURATIONS["tiny"] = DCAEConfig(**_autoencoder_sizes())
        try:
            return tensors(AutoencoderDC.from_efficientvit(folder))
        finally:
            del CONFIGURATIONS["tiny"]


@loader("dcae in diffusers", "*.safetensors", "config.json", "pronghorn.json", slow=True)
class DcaeInDiffusers:
    @staticmethod
    def write(folder):
        _autoencoder().save_pretrained(folder)

    @staticmethod
    def read(folder):
        from pronghorn.dcae import AutoencoderDC

        return tensors(AutoencoderDC.from_pretrained(folder))


@loader("dcae diffusion model", "*.safetensors", "config.json", "pronghorn.json", slow=True)
class DcaeDiffusion:
    @staticmethod
    def write(folder):
        from pronghorn.dcae.diffusers.training.models import new_model

        torch.manual_seed(0)
        model = new_model("usit", (4, 2, 2), 3, hidden_size=8, depth=2, num_attention_heads=2)
        model.save_pretrained(folder)

    @staticmethod
    def read(folder):
        from pronghorn.dcae.diffusers.uvit import UViT2DModel

        return tensors(UViT2DModel.from_pretrained(folder))


@loader("dcae latents", "one.npy")
class DcaeLatents:
    @staticmethod
    def write(folder):
        from pronghorn.dcae.latents import _write

        _write(folder / "one.npy", torch.linspace(-1, 1, 64).view(4, 4, 4).numpy())

    @staticmethod
    def read(folder):
        from pronghorn.dcae.latents import read_latent

        return read_latent(folder / "one.npy")
