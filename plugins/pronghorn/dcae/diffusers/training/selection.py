"""Which parts of an autoencoder a phase trains; all others stay bit for bit as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.dcae.phases import ALL, MIDDLE, PhaseConfig


def trained_modules(vae: Any, config: PhaseConfig) -> list[nn.Module]:
    """The modules of an autoencoder that a phase trains.

    Raises:
        ValueError: there are fewer blocks than the configuration asks for.
    """
    if config.phase == ALL:
        return [vae]
    encoder, decoder = vae.encoder, vae.decoder
    going_in = [block for stage in encoder.down_blocks for block in stage]
    going_out = [block for stage in reversed(decoder.up_blocks) for block in stage]
    for name, count in (("middle_blocks", config.middle_blocks), ("head_blocks", config.head_blocks)):
        most = min(len(going_in), len(going_out))
        if count > most:
            raise ValueError(f"{name}: got {count}, there are {most} blocks")
    if config.phase == MIDDLE:
        blocks = [*going_in[len(going_in) - config.middle_blocks :], *going_out[: config.middle_blocks]]
        return [*blocks, encoder.conv_out, decoder.conv_in]
    return [*going_out[len(going_out) - config.head_blocks :], decoder.norm_out, decoder.conv_out]


def select(vae: Any, modules: list[nn.Module]) -> None:
    """Let these modules alone want gradients and be in training mode: batch norms of all others stay as they are."""
    vae.requires_grad_(False).eval()
    for module in modules:
        module.requires_grad_(True).train()
