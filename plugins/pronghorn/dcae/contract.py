"""DC-AE's part of the contract of all methods: a small autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.contract import Contract, randomize
from pronghorn.dcae.config import EVIT, RES, DCAEConfig
from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC

STAGES = (RES, EVIT)
CONFIG = DCAEConfig(
    latent_channels=8, attention_head_dim=8, encoder_block_types=STAGES, decoder_block_types=STAGES,
    encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), encoder_layers_per_block=(0, 1),
    decoder_layers_per_block=(0, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    decoder_norm_types=("rms_norm",) * 2, decoder_act_fns=("silu",) * 2,
)  # fmt: skip


def _module(seed: int) -> AutoencoderDC:
    vae = AutoencoderDC(**CONFIG.to_dict()).eval()
    randomize(vae, seed, 1 / 8)
    return vae


def _run(module: AutoencoderDC) -> Tensor:
    return _batch(module, 1)


def _batch(module: AutoencoderDC, size: int) -> Tensor:
    found: Tensor = module(torch.linspace(-1, 1, size * 3 * 16 * 16).view(size, 3, 16, 16)).sample
    return found.detach()


contract = Contract(
    module=_module,
    run=_run,
    save=lambda module, folder: module.save_pretrained(folder),
    load=AutoencoderDC.from_pretrained,
    batches=_batch,
)
