"""Replays what the official implementations computed (`golden/dcae`), file by file, on the user's own device."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pronghorn.dcae.config import EVIT, DCAEConfig, published
from pronghorn.dcae.convert import to_diffusers, to_efficientvit
from pronghorn.dcae.diffusers import SIZES, AutoencoderDC, UViT2DModel, guided
from pronghorn.dcae.options import from_options
from pronghorn.kernels.shuffle_shortcut import shuffle_add, unshuffle_add
from pronghorn.verification import Check

TOLERANCE = 2e-5  # absolute, of float32
BFLOAT16_TOLERANCE = 2e-2  # relative to the largest number


def cases(folder: Path) -> list[Path]:
    """The golden files of a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".tsv"))


def replay(path: Path, device: torch.device | str = "cpu") -> list[Check]:
    """Compare our results with one golden file.

    Args:
        path: a `.safetensors` or `.tsv` file; its kind is told by how its name starts.
        device: where our side runs.

    Raises:
        ValueError: a kind of file that is not known. It is never passed over.
    """
    kinds = {"tiny_": _replay_model, "modules_": _replay_modules, "keys_": _replay_keys, "uvit_": _replay_uvit}
    for prefix, function in kinds.items():
        if path.name.startswith(prefix):
            with torch.no_grad():
                return function(path, torch.device(device))
    raise ValueError(f"{path.name}: unknown kind of golden file; known are {', '.join(kinds)}")


def _replay_model(path: Path, device: torch.device) -> list[Check]:
    described = json.loads(path.with_suffix(".json").read_text())
    golden = load_file(path, device=str(device))
    official = {name.removeprefix("w."): tensor for name, tensor in golden.items() if name.startswith("w.")}
    config = from_options(described["config"])
    model = AutoencoderDC(**config.to_dict()).to(device).eval()
    model.load_state_dict(to_diffusers(official))
    back = to_efficientvit(to_diffusers(official), config)
    checks = [_same("weights and back", back, official)]

    stages: dict[str, Tensor] = {}
    for number, stage in enumerate(model.encoder.down_blocks):
        stage.register_forward_hook(lambda _, __, y, name=f"enc_stage{number}": stages.__setitem__(name, y))
    checks.append(_near("latent", model.encode(golden["x"]).latent, golden["latent"]))
    for name, wanted in golden.items():
        if name.startswith("enc_stage"):
            # Kept in fp16 where they are large.
            loose = 1e-3 * float(wanted.abs().max()) if wanted.dtype == torch.float16 else TOLERANCE
            checks.append(_near(name, stages[name], wanted, loose))
    checks.append(_near("decoded", model.decode(golden["latent"]).sample, golden["decoded"]))
    for count in described.get("channels") or ():
        latent = golden[f"latent_c{count}"]
        checks.append(_near(f"latent_c{count}", model.encode(golden["x"], latent_channels=count).latent, latent))
        checks.append(_near(f"decoded_c{count}", model.decode(latent).sample, golden[f"decoded_c{count}"]))
    return checks


def _replay_modules(path: Path, device: torch.device) -> list[Check]:
    described = json.loads(path.with_suffix(".json").read_text())
    golden = load_file(path, device=str(device))
    channels, scales = described["C"], tuple(described["scales"])
    where = "encoder.stages.0.op_list.0."
    one = {"block_types": (EVIT,), "block_out_channels": (channels,), "layers_per_block": (1,),
           "qkv_multiscales": (scales,)}  # fmt: skip
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in one.items()}
    config = DCAEConfig.from_dict({
        "latent_channels": channels, "attention_head_dim": described["dim"], "decoder_norm_types": ("rms_norm",),
        "decoder_act_fns": ("silu",), **sides,
    })  # fmt: skip
    block = AutoencoderDC(**config.to_dict()).to(device).eval().encoder.down_blocks[0][0]
    parts = {"mla.": "context_module.main.", "glu.": "local_module.main."}
    official = {where + parts[name[:4]] + name[4:]: tensor for name, tensor in golden.items() if name[:4] in parts}
    state = to_diffusers(official)
    block.load_state_dict({name.removeprefix("encoder.down_blocks.0.0."): tensor for name, tensor in state.items()})
    attention, local = block.attn, block.conv_out
    attention.residual_connection = local.residual_connection = False
    checks = []
    for number in range(len(described["hws"])):
        x = golden[f"x{number}"]
        checks.append(_near(f"mla{number}", attention(x), golden[f"mla{number}"]))
        checks.append(_near(f"glu{number}", local(x), golden[f"glu{number}"]))
        checks.append(_bfloat16(number, attention, golden))
    sx = golden["sx"]
    for name, wanted in golden.items():
        for start, function in (("down_avg_", unshuffle_add), ("up_dup_", shuffle_add)):
            if name.startswith(start):
                found = function(torch.zeros_like(wanted), sx, factor=1 if "_f1_" in name else 2)
                checks.append(_near(name, found, wanted))
    return checks


def _bfloat16(number: int, attention: nn.Module, golden: dict[str, Tensor]) -> Check:
    """The module in bf16: against the official one in float32, which is the truth that both round."""
    wanted = golden[f"mla{number}"]
    attention = attention.to(torch.bfloat16)
    found = attention(golden[f"x{number}"].bfloat16()).float()
    attention.float()
    for name, tensor in to_diffusers(
        {f"encoder.stages.0.op_list.0.context_module.main.{key[4:]}": value
         for key, value in golden.items() if key.startswith("mla.")}
    ).items():  # fmt: skip
        attention.get_parameter(name.split("attn.", 1)[1]).copy_(tensor)  # bf16 had rounded it
    error = (found - wanted).abs().max() / wanted.abs().max()
    return Check(f"bf16_mla{number}", float(error), BFLOAT16_TOLERANCE)


def _replay_keys(path: Path, device: torch.device) -> list[Check]:
    """Names and shapes of a whole model, without its memory."""
    with path.open() as lines:
        wanted = {row[0]: row[1] for row in csv.reader(lines, delimiter="\t")}
    state = _named(path.stem.removeprefix("keys_"))
    found = {key: "x".join(map(str, tensor.shape)) for key, tensor in state.items()}
    differing = [key for key in {**wanted, **found} if wanted.get(key, "") != found.get(key, "")]
    return [Check(f"{len(wanted)} names and shapes; differing: {differing[:3]}", len(differing), 0)]


def _named(model: str) -> dict[str, Tensor]:
    """Weights of a model that take no memory."""
    with torch.device("meta"):
        if model.startswith("uvit_"):
            depth, hidden_size, heads = SIZES[model.removeprefix("uvit_").upper()]
            uvit: dict[str, Tensor] = UViT2DModel(
                depth=depth, hidden_size=hidden_size, num_attention_heads=heads
            ).state_dict()
            return uvit
        config = published(model.removesuffix("_diffusers"))
        state: dict[str, Tensor] = AutoencoderDC(**config.to_dict()).state_dict()
    return state if model.endswith("_diffusers") else to_efficientvit(state, config)


def _replay_uvit(path: Path, device: torch.device) -> list[Check]:
    described = json.loads(path.with_suffix(".json").read_text())
    described["sample_size"], described["num_attention_heads"] = described.pop("input_size"), described.pop("num_heads")
    golden = load_file(path, device=str(device))
    model = UViT2DModel(**described).to(device).eval()
    model.load_state_dict({name.removeprefix("w."): value for name, value in golden.items() if name.startswith("w.")})
    x, t, y = golden["x"], golden["t"], golden["y"]
    checks = [_near("out", model(x, t, y).sample, golden["out"])]
    for name, wanted in golden.items():
        if name.startswith("out_cfg"):
            found = guided(model, x, t, y, float(name.removeprefix("out_cfg")))
            checks.append(_near(name, found.repeat(2, 1, 1, 1), wanted))
    return checks


def _near(name: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> Check:
    if ours.shape != theirs.shape:
        return Check(f"{name}: {tuple(ours.shape)} for {tuple(theirs.shape)}", float("inf"), tolerance)
    return Check(name, float((ours.float() - theirs.float()).abs().max()), tolerance)


def _same(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Check:
    """How many tensors are not equal to the last bit."""
    differing = [key for key in {**ours, **theirs}
                 if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key])]  # fmt: skip
    return Check(f"{name}; differing: {differing[:3]}", len(differing), 0)
