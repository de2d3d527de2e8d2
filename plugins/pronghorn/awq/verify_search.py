"""Replays the official implementations' searches (golden files `search_*` and `autoawq_search_*`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.search import AwqSearch, SearchResult
from pronghorn.verification import Check

SCALE_RTOL = 1e-3  # one of twenty curves is chosen: a neighbouring one is much further away
CLIP_RTOL, CLIP_SHARE = 1e-4, 0.97  # near-ties differ between float32 and float64 in the official code itself
LOGITS_TOLERANCE, LOGITS_TOLERANCE_WITH_TIES = 1e-3, 2e-2


def replay_search(path: Path, device: torch.device) -> list[Check]:
    """Run our search on the model, weights and tokens of one golden file and compare all that it stores.

    Args:
        path: the `.safetensors` file; its `.json` lies beside it.
        device: where to run.
    """
    description = json.loads(path.with_suffix(".json").read_text())
    golden = load_file(path)
    source = description.get("weights_from", "").split(" ")[0]
    weights = load_file(path.with_name(source)) if source else golden
    config = AwqConfig(
        bits=description.get("n_bit", 4),
        group_size=description["group_size"],
        duo_scaling=description.get("duo_scaling", False),
        clip=description.get("apply_clip", True),
    )
    model = _model(description["config"], weights).to(device)
    ids = golden["ids"].long().to(device)
    fp_logits = _logits(model, ids[:1])
    search = AwqSearch(config, progress=False)
    # These files come from AutoAWQ run on a CPU. With the paper's rule the first trial's scale is 1 and nothing shows.
    search.keep_first_trial = path.name.startswith("autoawq")
    found = search.run(model, [ids])
    checks = [Check("logits of the unquantized model", _error(fp_logits, golden["logits_fp"]), LOGITS_TOLERANCE)]
    checks += _compare_groups(found, description)
    checks += _compare_scales(found, golden)
    clips, ties = _compare_clips(found, golden)
    checks += clips
    found.apply(model)
    tolerance = LOGITS_TOLERANCE_WITH_TIES if ties else LOGITS_TOLERANCE
    if "logits_awq_fake" in golden:
        _fake_quantize(model, config)
        checks.append(
            Check("logits, fake quantized", _error(_logits(model, ids[:1]), golden["logits_awq_fake"]), tolerance)
        )
    if "logits_dequant_fp32" in golden:
        if any(name.startswith("packed.") for name in golden):
            checks.append(_compare_packed(model, golden, config))
        _round_trip_through_half(model, config)
        error = _error(_logits(model, ids[:1]), golden["logits_dequant_fp32"])
        checks.append(Check("logits, dequantized fp16 checkpoint", error, tolerance))
    return checks


def _compare_groups(found: SearchResult, description: dict[str, Any]) -> list[Check]:
    def local(name: str) -> str:
        return name.split(".layers.0.", 1)[-1]

    ours = [(local(prev), tuple(map(local, linears))) for prev, linears, _ in found.scale]
    theirs = [(local(entry["prev_op"]), tuple(map(local, entry["layers"]))) for entry in description["scale_order"]]
    clips_match = [local(name) for name, _ in found.clip] == [local(e["layer"]) for e in description["clip_order"]]
    return [
        Check("scale groups that differ", float(len(set(ours) ^ set(theirs))), 0.0),
        Check("order of the scale groups and clips differs", float(ours != theirs or not clips_match), 0.0),
    ]


def _compare_scales(found: SearchResult, golden: dict[str, Tensor]) -> list[Check]:
    checks = []
    for index, (prev, _, scale) in enumerate(found.scale):
        wanted = golden[f"scale.{index}"]
        error = ((scale.cpu().float() - wanted).abs() / wanted.abs()).max().item()
        checks.append(Check(f"scale of {prev}", error, SCALE_RTOL))
    return checks


def _compare_clips(found: SearchResult, golden: dict[str, Tensor]) -> tuple[list[Check], int]:
    equal = total = 0
    for index, (_, maximum) in enumerate(found.clip):
        wanted = golden[f"clip.{index}"]
        equal += int(((maximum.cpu().float() - wanted).abs() <= CLIP_RTOL * wanted.abs()).sum())
        total += wanted.numel()
    if not total:
        return [], 0
    return [Check("share of clip maxima that differ", 1 - equal / total, 1 - CLIP_SHARE)], total - equal


def _compare_packed(model: Any, golden: dict[str, Tensor], config: AwqConfig) -> Check:
    """Share of the codes of the published gemm checkpoint that ours differ from (only where clip maxima tie)."""
    from pronghorn.kernels.dequantize_weight import layouts
    from pronghorn.kernels.group_fake_quantize import group_quantize

    different = total = 0
    for key in golden:
        if not key.endswith(".qweight"):
            continue
        name = key.removeprefix("packed.").removesuffix(".qweight")
        weight = model.get_submodule(name).weight.detach().half()
        codes, _, _ = group_quantize(weight, bits=config.bits, group_size=config.group_size)
        theirs = {part: golden[f"packed.{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        rows, columns = weight.shape
        wanted, _, _ = layouts.unpack(
            theirs,
            layout="gemm",
            bits=config.bits,
            group_size=config.group_size,
            out_features=rows,
            in_features=columns,
        )
        different += int((codes.cpu() != wanted).sum())
        total += codes.numel()
    return Check("share of packed codes that differ", different / total, 1 - CLIP_SHARE)


def _model(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = config["model_type"]
    fields = {key: value for key, value in config.items() if not key.startswith("_") and key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32).eval()
    state = {
        key.removeprefix("weights."): value.float() for key, value in weights.items() if key.startswith("weights.")
    }
    model.load_state_dict(state, strict=True)
    return model


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


@torch.no_grad()
def _fake_quantize(model: nn.Module, config: AwqConfig) -> None:
    from pronghorn.kernels.group_fake_quantize import group_fake_quantize

    for linear in _linears(model):
        linear.weight.copy_(group_fake_quantize(linear.weight, bits=config.bits, group_size=config.group_size)[0])


@torch.no_grad()
def _round_trip_through_half(model: nn.Module, config: AwqConfig) -> None:
    """What a packed fp16 checkpoint keeps: all parameters of the block in half, its linears also quantized there."""
    from pronghorn.kernels.group_fake_quantize import group_fake_quantize

    for linear in _linears(model):
        half = linear.weight.half()
        linear.weight.copy_(group_fake_quantize(half, bits=config.bits, group_size=config.group_size)[0].float())


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits.cpu().float()


def _error(value: Tensor, wanted: Tensor) -> float:
    return ((value - wanted).norm() / wanted.norm()).item()
