"""Weights between the official code's names (efficientvit, DC-Gen) and diffusers' `AutoencoderDC`, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from pronghorn.dcae.config import DCAEConfig

QKV, PROJECTION = "qkv.conv.weight", "context_module.main.proj.conv.weight"
THIRDS = ("to_q.weight", "to_k.weight", "to_v.weight")
# Of what a name says after its block, official and diffusers'; each pair is read in both directions.
BLOCK_PARTS = (
    ("main.conv1.conv.", "conv1."),
    ("main.conv2.conv.", "conv2."),
    ("main.conv2.norm.", "norm."),
    ("context_module.main.aggreg.{n}.0.", "attn.to_qkv_multiscale.{n}.proj_in."),
    ("context_module.main.aggreg.{n}.1.", "attn.to_qkv_multiscale.{n}.proj_out."),
    ("context_module.main.proj.conv.", "attn.to_out."),
    ("context_module.main.proj.norm.", "attn.norm_out."),
    ("local_module.main.inverted_conv.conv.", "conv_out.conv_inverted."),
    ("local_module.main.depth_conv.conv.", "conv_out.conv_depth."),
    ("local_module.main.point_conv.conv.", "conv_out.conv_point."),
    ("local_module.main.point_conv.norm.", "conv_out.norm."),
)
BLOCK = re.compile(r"(encoder|decoder)\.(?:stages|down_blocks|up_blocks)\.(\d+)\.(?:op_list\.)?(\d+)\.(.+)")
NUMBER = re.compile(r"\.(\d+)\.")


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in diffusers' names.

    Rows of the official `qkv` are cut into thirds as they lie: the attention joins them again before it takes queries,
    keys and values out of each head's rows, so nothing may be reordered.

    Args:
        state: weights by their official names.

    Raises:
        ValueError: a name is none of an autoencoder, or a shape cannot be cut as its name says.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = BLOCK.fullmatch(name)
        if found is None:
            result[_outer_to_diffusers(name)] = tensor
            continue
        side, stage, block, rest = found.groups()
        if rest.endswith((QKV, PROJECTION)) and (tensor.dim() < 2 or (rest.endswith(QKV) and len(tensor) % 3)):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted a convolution's, qkv's rows in thirds")
        where = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{stage}.{block}."
        if rest.endswith(QKV):
            for part, third in zip(tensor.flatten(1).chunk(3), THIRDS, strict=True):
                result[f"{where}attn.{third}"] = part.clone()
        else:
            flat = tensor.flatten(1) if rest == PROJECTION else tensor
            result[where + _part_to_diffusers(name, rest)] = flat
    return result


def to_efficientvit(state: dict[str, Tensor], config: DCAEConfig) -> dict[str, Tensor]:
    """Weights in the official names; `to_diffusers` backwards.

    Args:
        state: weights of an `AutoencoderDC`.
        config: its configuration, which official names depend on.

    Raises:
        ValueError: a name is none of an autoencoder.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = BLOCK.fullmatch(name)
        if found is None:
            result[_outer_to_efficientvit(name, config)] = tensor
            continue
        side, stage, block, rest = found.groups()
        where = f"{side}.stages.{stage}.op_list.{block}."
        if rest == f"attn.{THIRDS[0]}":
            prefix = name.removesuffix(THIRDS[0])
            result[f"{where}context_module.main.{QKV}"] = torch.cat([state[prefix + third] for third in THIRDS])[
                :, :, None, None
            ]
        elif rest not in [f"attn.{third}" for third in THIRDS]:
            whole = tensor[:, :, None, None] if rest == "attn.to_out.weight" else tensor
            result[where + _part_to_efficientvit(name, rest, side, config)] = whole
    return result


def _part_to_diffusers(name: str, rest: str) -> str:
    # A resampling convolution stands within a second module where pixels are shuffled.
    rest = re.sub(r"^main\.conv\.(conv\.)?(weight|bias)$", r"conv.\2", rest)
    return _translated(name, rest, BLOCK_PARTS) if not rest.startswith("conv.") else rest


def _part_to_efficientvit(name: str, rest: str, side: str, config: DCAEConfig) -> str:
    if rest.startswith("conv."):
        return ("main." if side == "encoder" and config.downsample_block_type == "conv" else "main.conv.") + rest
    return _translated(name, rest, [(theirs, ours) for ours, theirs in BLOCK_PARTS])


def _translated(name: str, rest: str, parts: Iterable[tuple[str, str]]) -> str:
    number = NUMBER.search(rest)
    for before, after in parts:
        before, after = (text.format(n=number[1] if number else 0) for text in (before, after))
        if rest.startswith(before):
            return after + rest.removeprefix(before)
    raise ValueError(f"{name}: no weight of a deep compression autoencoder")


def _outer_to_diffusers(name: str) -> str:
    for before, after in (
        (r"encoder\.project_in\.conv\.", "encoder.conv_in."),
        (r"encoder\.project_out\.(?:main\.)?op_list\.0\.conv\.", "encoder.conv_out."),
        (r"decoder\.project_in\.(?:main\.)?conv\.", "decoder.conv_in."),
        (r"decoder\.project_out\.op_list\.0\.", "decoder.norm_out."),
        (r"decoder\.project_out\.op_list\.2\.conv\.", "decoder.conv_out."),
    ):
        changed, count = re.subn(f"^{before}", after, name)
        if count:
            return changed
    raise ValueError(f"{name}: no weight of a deep compression autoencoder")


def _outer_to_efficientvit(name: str, config: DCAEConfig) -> str:
    out = "main.op_list" if config.encoder_out_shortcut else "op_list"
    for before, after in (
        ("encoder.conv_in.", "encoder.project_in.conv."),
        ("encoder.conv_out.", f"encoder.project_out.{out}.0.conv."),
        ("decoder.conv_in.", f"decoder.project_in.{'main.' if config.decoder_in_shortcut else ''}conv."),
        ("decoder.norm_out.", "decoder.project_out.op_list.0."),
        ("decoder.conv_out.", "decoder.project_out.op_list.2.conv."),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    raise ValueError(f"{name}: no weight of a deep compression autoencoder")
