"""DC-AE: train an autoencoder, encode and decode images of any size in bounded memory, and in fewer channels.

Its few steps teach it little (`make demo` takes some hundreds): what is shown is that all ways give the same.
"""

import tempfile

import torch

from pronghorn.dcae import AutoencoderDC, AutoencoderTrainer, DCAEConfig, PhaseConfig, accelerate_dcae

# A small relative of dc-ae-f64c128-1.5: 16 times smaller edges, 32 channels, of which the first 8 and 16 also do.
CONFIG = DCAEConfig(
    latent_channels=32,
    latent_channels_list=(8, 16, 32),
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 2,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 2,
    encoder_block_out_channels=(16, 32, 32, 64, 64),
    decoder_block_out_channels=(16, 32, 32, 64, 64),
    encoder_layers_per_block=(0, 1, 1, 1, 1),
    decoder_layers_per_block=(0, 1, 1, 1, 1),
    encoder_qkv_multiscales=((),) * 5,
    decoder_qkv_multiscales=((),) * 5,
    decoder_norm_types=("rms_norm",) * 5,
    decoder_act_fns=("silu",) * 5,
    encoder_out_shortcut=False,
    decoder_in_shortcut=False,
)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    vae = AutoencoderDC(**CONFIG.to_dict())
    phase = PhaseConfig(phase=1, steps=5, batch_size=2, resolution=64)
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        AutoencoderTrainer(vae, phase, [torch.rand(3, 96, 128) * 2 - 1], output=folder).fit()
    image = torch.rand(1, 3, 336, 528) * 2 - 1
    latent = vae.encode(image).latent
    whole = vae.decode(latent).sample
    print(f"image {tuple(image.shape)}, latent {tuple(latent.shape)}")
    with accelerate_dcae(vae):
        fast = vae.decode(latent).sample
        vae.enable_tiling(tile_sample_min_height=128, tile_sample_min_width=128)
        tiled = vae.decode(latent).sample
    vae.disable_tiling()
    print(f"fused kernels differ by {(fast - whole).abs().max():.1e}, tiles by {(tiled - whole).abs().max():.1e}")
    few = vae.encode(image, latent_channels=8).latent
    print(f"the first {few.shape[1]} channels decode to {tuple(vae.decode(few).sample.shape)}")


if __name__ == "__main__":
    main()
