"""The official code's options for an architecture, `encoder.width_list=[128,256] …`, as a configuration."""

from __future__ import annotations

from typing import Any

from pronghorn.dcae.config import EVIT, RES, DCAEConfig

BLOCKS = {
    "ResBlock": (RES, ()), "EViT_GLU": (EVIT, ()), "EViTGLU": (EVIT, ()), "EViTS5_GLU": (EVIT, (5,)),
    "EViTS5GLU": (EVIT, (5,)),
}  # fmt: skip
NORMS = {"bn2d": "batch_norm", "trms2d": "rms_norm"}
RESAMPLERS = {
    "ConvPixelUnshuffle": "pixel_unshuffle", "Conv": "conv", "ConvPixelShuffle": "pixel_shuffle",
    "InterpolateConv": "interpolate",
}  # fmt: skip
# Options that the official code has by itself.
DEFAULTS = {
    "encoder.downsample_block_type": "ConvPixelUnshuffle", "decoder.upsample_block_type": "ConvPixelShuffle",
    "decoder.norm": "trms2d", "decoder.act": "silu", "decoder.out_act": "relu", "encoder.out_shortcut": "averaging",
    "decoder.in_shortcut": "duplicating", "encoder.out_block_type": "ConvLayer", "decoder.in_block_type": "ConvLayer",
}  # fmt: skip
REQUIRED = ("latent_channels", *(f"{side}.{name}" for side in ("encoder", "decoder")
                                 for name in ("block_type", "width_list", "depth_list")))  # fmt: skip


def from_options(text: str, *, attention_head_dim: int = 32) -> DCAEConfig:
    """A configuration from the official code's options.

    Args:
        text: words like `decoder.norm=[bn2d,bn2d,trms2d]`; one value stands for every stage.
        attention_head_dim: channels of an attention head.

    Raises:
        ValueError: an option is unknown, missing, or has an unknown value.
    """
    given = dict(word.split("=", 1) for word in text.split())
    unknown = set(given) - set(DEFAULTS) - set(REQUIRED)
    missing = set(REQUIRED) - set(given)
    if unknown or missing:
        raise ValueError(f"options: unknown are {sorted(unknown)}, missing {sorted(missing)}")
    options = {name: _value(value) for name, value in {**DEFAULTS, **given}.items()}
    stages = len(options["encoder.width_list"])

    def every(name: str) -> list[Any]:
        value = options[name]
        return value if isinstance(value, list) else [value] * stages

    values: dict[str, Any] = {"latent_channels": options["latent_channels"], "attention_head_dim": attention_head_dim}
    for side in ("encoder", "decoder"):
        blocks = [_known(f"{side}.block_type", name, BLOCKS) for name in every(f"{side}.block_type")]
        values[f"{side}_block_types"], values[f"{side}_qkv_multiscales"] = zip(*blocks, strict=True)
        values[f"{side}_block_out_channels"] = options[f"{side}.width_list"]
        values[f"{side}_layers_per_block"] = options[f"{side}.depth_list"]
    for name, option in (("downsample_block_type", "encoder.downsample_block_type"),
                         ("upsample_block_type", "decoder.upsample_block_type")):  # fmt: skip
        values[name] = _known(option, options[option], RESAMPLERS)
    return DCAEConfig(
        **values,
        decoder_norm_types=tuple(_known("decoder.norm", name, NORMS) for name in every("decoder.norm")),
        decoder_act_fns=tuple(every("decoder.act")), decoder_conv_act_fn=options["decoder.out_act"],
        encoder_out_shortcut=options["encoder.out_shortcut"] is not None,
        decoder_in_shortcut=options["decoder.in_shortcut"] is not None,
    )  # fmt: skip


def _value(text: str) -> Any:
    if text.startswith("["):
        return [_value(part.strip()) for part in text.strip("[]").split(",")]
    if text == "null":
        return None
    return int(text) if text.isdigit() else text


def _known(option: str, value: Any, accepted: dict[str, Any]) -> Any:
    if value not in accepted:
        raise ValueError(f"{option}: got {value!r}, accepted are {', '.join(accepted)}")
    return accepted[value]
