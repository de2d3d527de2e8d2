"""Replays what the authors' code computed (`golden/vcpo`), file by file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pronghorn.kernels.seq_is_stats import seq_is_stats
from pronghorn.vcpo.baseline import baseline
from pronghorn.vcpo.config import MEAN, MEDIAN, OFF, REFERENCE, WINSORIZED, VCPOSettings
from pronghorn.vcpo.ess import ReferenceESS, effective_sample_size
from pronghorn.vcpo.gradient import accumulate
from pronghorn.vcpo.minibatch import Minibatch
from pronghorn.vcpo.ratios import clipped_log_ratios
from pronghorn.vcpo.step import vcpo_step
from pronghorn.verification import Check

# Relative. The authors' side of a step runs partly in float32: norms of the model, its softmax, deviations of rewards.
STEP, TABLE = 1e-5, 1e-6
DIVERGENCE = 1e-4  # exp(r) - r - 1 of a small r keeps few of r's digits
RECORDS = {
    "response_length": "response_length", "reward_scalar": "reward", "advantage_scalar": "advantage",
    "grad_norm": "grad_norm", "grad_norm_unscaled": "grad_norm_unscaled", "kl_rollout_old": "k3_kl",
    "rollout_is_geom_mean": "geometric_mean_ratio", "rollout_seq_is": "ratio",
    "rollout_seq_is_clipped": "clipped_ratio",
}  # fmt: skip
OPTIONS = {
    "scope": "opob", "agg_mode": "opob_aggregation", "norm_by_std": "opob_norm_by_std",
    "use_is_weights": "use_is_weights", "use_clipped_is_ratios": "use_clipped_is_ratios",
    "normalize_by_length": "normalize_by_length",
}  # fmt: skip


def cases(folder: Path) -> list[Path]:
    """The golden files of a folder: tensors, and JSON that describes none."""
    described = {path.with_suffix(".json") for path in folder.glob("*.safetensors")}
    tables = [path for path in folder.glob("*.json") if path not in described]
    return sorted([*folder.glob("*.safetensors"), *tables])


def replay(path: Path, device: torch.device | str = "cpu") -> list[Check]:
    """Compare our results with one golden file.

    Args:
        path: the file; its kind is told by how its name starts.
        device: where our side runs.

    Raises:
        ValueError: a kind of file that is not known, or a setting in it. It is never passed over.
    """
    for prefix, function in _KINDS.items():
        if path.name.startswith(prefix):
            return function(path, torch.device(device))
    raise ValueError(f"{path.name}: unknown kind of golden file; known are {', '.join(_KINDS)}")


def _config(about: dict[str, Any]) -> VCPOSettings:
    opob, ess = dict(about["opob"]), dict(about["ess"])
    values = {OPTIONS[name]: value for name, value in opob.items() if name != "enable"}
    if not opob["enable"]:
        values["opob"] = OFF
    return VCPOSettings(
        **values, opob_weight=REFERENCE, is_truncation=about["threshold"], ess_space=REFERENCE,
        ess_scaling=ess["scaling_rule"] if ess["enable"] else OFF, ess_reference=ess["base_ess_ratio"],
        ess_use_clipped=ess["use_clipped"], loss_aggregation=about["loss_agg_mode"],
    )  # fmt: skip


def _model(golden: dict[str, Tensor]) -> Any:
    import transformers

    weights = {name.removeprefix("weights."): t for name, t in golden.items() if name.startswith("weights.")}
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    vocab, hidden = weights["model.embed_tokens.weight"].shape
    keys = weights["model.layers.0.self_attn.k_proj.weight"].shape[0]
    head_dim = hidden // 4  # all models of this kind have four heads
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, num_hidden_layers=len(layers), num_attention_heads=4,
            intermediate_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0], rms_norm_eps=1e-6,
            num_key_value_heads=keys // head_dim, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).double()  # fmt: skip
    model.load_state_dict(weights)
    return model.eval()


def _replay_step(path: Path, device: torch.device) -> list[Check]:
    golden, about = load_file(path, device=str(device)), json.loads(path.with_suffix(".json").read_text())
    config, model, ids = _config(about), _model(golden).to(device), golden["input_ids"]
    count, tokens = golden["response_mask"].shape

    def log_probs_of(row: int) -> Tensor:
        logits = model(ids[row : row + 1]).logits[0, -tokens - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[row, -tokens:, None])[:, 0]

    minibatch = Minibatch(
        golden["rollout_log_probs"], golden["response_mask"].bool(), golden["rewards"], golden["advantages"],
        torch.arange(count, device=device) // about["G"],
    )  # fmt: skip
    found = accumulate(log_probs_of, list(model.parameters()), minibatch, config)
    named = zip(model.named_parameters(), found.gradients, strict=True)
    checks = [_near(f"grad.{name}", grad, golden[f"grad.{name}"], STEP) for (name, _), grad in named]
    optimizer = torch.optim.AdamW(model.parameters(), lr=about["base_lr"])
    step = vcpo_step(found, optimizer, minibatch, config, ReferenceESS(config), staleness=0)
    checks.append(_close("baselines", step.baselines, about["opob_baselines"], STEP))
    checks.append(_close("grad norm", [step.grad_norm], [about["grad_norm_before_clip"]], STEP))
    checks.append(_close("learning rate", step.learning_rates, [about["lr_used"]], STEP))
    for name in ("ess", "ess_clipped", "ess_ratio", "ess_ratio_clipped"):
        checks.append(_close(name, [getattr(step, name)], [about["metrics"][f"minibatch_{name}"]], STEP))
    for theirs, ours in RECORDS.items():
        values = [getattr(record, ours) for record in step.trajectories]
        tolerance = DIVERGENCE if ours == "k3_kl" else STEP
        checks.append(_close(theirs, values, [record[theirs] for record in about["records"]], tolerance))
    return checks


def _replay_ess(path: Path, device: torch.device) -> list[Check]:
    checks = []
    for number, case in enumerate(json.loads(path.read_text())):
        learner, sampler = (
            torch.tensor(case[key], dtype=torch.float64, device=device) for key in ("current_logp", "rollout_logp")
        )
        mask = torch.tensor(case["mask"], device=device).bool()
        config = VCPOSettings(is_truncation=case["threshold"])
        found = seq_is_stats(learner, sampler, mask, config.is_truncation)
        ratios = found.log_ratios
        clipped = clipped_log_ratios(ratios, config)
        tables = {"seq_is": ratios.exp(), "geom": found.geometric_mean, "k3": found.k3}
        if config.is_truncation is not None:
            tables["seq_is_clipped"] = clipped.exp()
        for name, ours in tables.items():
            checks.append(_close(f"{number}: {name}", ours.tolist(), case[name], TABLE))
        for name, logs in (("ess", ratios), ("ess_clipped", clipped)):
            theirs = [case["ess"][name], case["ess"][name.replace("ess", "ess_ratio")]]
            ess = effective_sample_size(logs, REFERENCE)
            checks.append(_close(f"{number}: {name}", [ess, ess / len(ratios)], theirs, TABLE))
            exact = effective_sample_size(logs)
            if ess > 0.5:  # what their 1e-8 has not swallowed, and did not overflow, is the same without it
                checks.append(_close(f"{number}: {name} in log space", [exact], [ess], STEP))
            inside = 1 - TABLE <= exact <= len(ratios) * (1 + TABLE)
            checks.append(Check(f"{number}: {name} from 1 to {len(ratios)}", 0.0 if inside else math.inf, 0.0))
    return checks


def _replay_aggregations(path: Path, device: torch.device) -> list[Check]:
    checks = []
    for number, case in enumerate(json.loads(path.read_text())):
        values, weights = (torch.tensor(case[key], dtype=torch.float64, device=device) for key in ("values", "weights"))
        for key, aggregation in (("mean", MEAN), ("median", MEDIAN), ("winsorized", WINSORIZED)):
            config = VCPOSettings(opob_weight=REFERENCE, opob_aggregation=aggregation)
            checks.append(_close(f"{number}: {key}", [baseline(values, weights, config)], [case[key]], TABLE))
    return checks


def _near(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Check:
    """Relative to the largest number of a tensor."""
    if ours.shape != theirs.shape:
        return Check(f"{name}: {list(ours.shape)} for {list(theirs.shape)}", math.inf, tolerance)
    error = float((ours.double() - theirs.double()).abs().max())
    return Check(name, error / max(float(theirs.abs().max()), 1e-12), tolerance)


def _close(name: str, ours: list[float], theirs: list[Any], tolerance: float) -> Check:
    """Relative, number by number; their NaN and infinity, which JSON keeps as words, are to be the same."""
    if len(ours) != len(theirs):
        return Check(f"{name}: {len(ours)} numbers for {len(theirs)}", math.inf, tolerance)
    return Check(name, max([_distance(a, float(b)) for a, b in zip(ours, theirs, strict=True)], default=0.0), tolerance)


def _distance(ours: float, theirs: float) -> float:
    if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
        return 0.0
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


_KINDS: dict[str, Callable[[Path, torch.device], list[Check]]] = {
    "step_": _replay_step,
    "ess_cases": _replay_ess,
    "aggregations": _replay_aggregations,
}
