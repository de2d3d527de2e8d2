"""Replays what the official implementation computed (`golden/duoattention`), file by file, on the user's own device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.gates import Step
from pronghorn.duoattention.pattern import load_pattern, threshold_gates
from pronghorn.kernels.head_sparse_attention.reference import visible
from pronghorn.kernels.kv_quantize import kv_dequantize, kv_quantize
from pronghorn.verification import Check

HIDDEN, CACHE, TRAINED = 5e-5, 1e-5, 1e-4  # the last relative to the largest


def cases(folder: Path) -> list[Path]:
    """The golden files of a folder, and the patterns below it."""
    described = {path.with_suffix(".json") for path in folder.glob("*.safetensors")}
    tables = [path for path in folder.glob("*.json") if path not in described]
    return sorted([*folder.glob("*.safetensors"), *tables, *folder.glob("attn_patterns/*/*/full_attention_heads.tsv")])


def replay(path: Path, device: torch.device | str = "cpu") -> list[Check]:
    """Compare our results with one golden file.

    Args:
        path: the file; its kind is told by how its name starts.
        device: where our side runs.

    Raises:
        ValueError: a kind of file that is not known. It is never passed over.
    """
    for prefix, function in _KINDS.items():
        if path.name.startswith(prefix):
            return function(path, torch.device(device))
    raise ValueError(f"{path.name}: unknown kind of golden file; known are {', '.join(_KINDS)}")


def _far(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Check:
    if ours.shape != theirs.shape:
        return Check(f"{name}: {tuple(ours.shape)} for {tuple(theirs.shape)}", 1.0, 0.0)
    error = (ours.detach().double().cpu() - theirs.double().cpu()).abs()
    return Check(name, float(error.max()) if error.numel() else 0.0, tolerance)


def _equal(name: str, ours: Any, theirs: Any) -> Check:
    return Check(name, 0.0 if ours == theirs else 1.0, 0.0)


def _model(path: Path, golden: dict[str, Tensor], about: dict[str, Any], device: torch.device) -> Any:
    import transformers

    kinds = {"llama": "Llama", "mistral": "Mistral"}
    if about["kind"] not in kinds:
        raise ValueError(f"{path.name}: unknown kind of model {about['kind']!r}; known are {', '.join(kinds)}")
    config = dict(about["config"])
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    name = kinds[about["kind"]]
    options = {"sliding_window": None} if name == "Mistral" else {}  # as the published models have it
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**config, **options, rope_parameters=rope)
    )
    model.load_state_dict({key[2:]: tensor for key, tensor in golden.items() if key.startswith("w.")})
    return model.to(device).eval()


def _loaded(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


@torch.no_grad()
def _replay_eval(path: Path, device: torch.device) -> list[Check]:
    golden, about = _loaded(path)
    ids = golden["input_ids"].to(device)
    checks = []
    if "dense.last_logits" in golden:
        logits = _model(path, golden, about, device)(ids).logits[:, -1:]
        checks.append(_far("without", logits, golden["dense.last_logits"], HIDDEN))
    for reorder in (True, False):
        for static in (False, True):
            name = f"{'weights' if reorder else 'indices'}, {'static' if static else 'dynamic'}"
            checks += _replay_calls(name, _model(path, golden, about, device), golden, about, ids, reorder, static)
    return checks


def _replay_calls(
    name: str, model: Any, golden: dict[str, Tensor], about: dict[str, Any], ids: Tensor, reorder: bool, static: bool
) -> list[Check]:
    from pronghorn.duoattention.transformers import apply_duo

    config = DuoAttentionConfig(
        gates=about["pattern"], threshold=0.5, sink_size=about["sink"], recent_size=about["recent"]
    )
    duo = apply_duo(model, config, reorder=reorder)
    cache = duo.make_cache(static=static, max_len=ids.shape[1] if static else None)
    checks, calls = [], [*about["chunks"], *[1] * about["ndec"]]
    for call, tokens in enumerate(ids.split(calls, dim=1)):
        hidden = model.get_decoder()(tokens, past_key_values=cache).last_hidden_state
        logits = model.lm_head(hidden[:, -1:])
        checks.append(_far(f"{name}: hidden {call}", hidden, golden[f"call{call}.hidden"], HIDDEN))
        checks.append(_far(f"{name}: logits {call}", logits, golden[f"call{call}.last_logits"], HIDDEN))
        if not static:
            shapes = [[_stacked(layer.full), _stacked(layer.streaming)] for layer in cache.layers]
            found = [[list(tensor.shape) for tensor in layer] for layer in shapes]
            checks.append(_equal(f"{name}: shapes {call}", found, about["cache_shapes_after_each_call"][call]))
    for index, layer in enumerate(cache.layers if not static else ()):
        for kind, stored in (("full", layer.full), ("stream", layer.streaming)):
            checks.append(
                _far(f"{name}: cache {index} {kind}", _stacked(stored), golden[f"final_cache.{index}.{kind}"], CACHE)
            )
    return checks


def _stacked(stored: list[Tensor]) -> Tensor:
    return torch.cat(stored)


def _replay_train(path: Path, device: torch.device) -> list[Check]:
    """The run as it goes, and each of its steps from the gates that the authors' code had before it.

    A run's gradients are compared in the second way only: what was rounded in the steps before shows in them.
    """
    golden, about = _loaded(path)
    model = _model(path, golden, about, device)
    checks = []
    for step, found, gates, _, _ in _training(model, golden, about, device, from_golden=False):
        checks.append(_far(f"gates {step}", gates, golden[f"step{step}.alpha_after"], 1e-5))
        log = about["log"][step]
        for name, value in (
            ("lr", found.learning_rate), ("distill", found.distillation), ("reg", found.regularization),
        ):  # fmt: skip
            checks.append(Check(f"{name} {step}", abs(value - log[name]), TRAINED * max(abs(log[name]), 1e-6)))
    for step, _, gates, gradient, hidden in _training(model, golden, about, device, from_golden=True):
        checks.append(_far(f"gates {step}, from theirs", gates, golden[f"step{step}.alpha_after"], 1e-5))
        checks.append(_near(f"gradient {step}", gradient, golden[f"step{step}.grad"]))
        for name, ours in zip(("full_hidden", "mixed_hidden"), hidden, strict=True):
            if f"step{step}.{name}" in golden:
                checks.append(_near(f"{name} {step}", ours, golden[f"step{step}.{name}"]))
    return checks


def _near(name: str, ours: Tensor, theirs: Tensor) -> Check:
    return _far(name, ours, theirs, TRAINED * float(theirs.abs().max()))


def _training(
    model: Any, golden: dict[str, Tensor], about: dict[str, Any], device: torch.device, *, from_golden: bool
) -> Iterator[tuple[int, Step, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Of each step its number, losses, the gates after it, their gradients, and both streams' hidden states."""
    from pronghorn.duoattention.gates import GateOptimizer
    from pronghorn.duoattention.transformers.gated import TwoStreams

    initial = golden["alpha_init"].to(device)
    optimizer = GateOptimizer(
        (initial.shape[0], initial.shape[1]), num_steps=about["num_steps"], lr=about["lr"],
        reg_weight=about["reg_weight"], device=device,
    )  # fmt: skip
    gradients: dict[int, Tensor] = {}
    for index, gate in enumerate(optimizer.gates):
        gate.data.copy_(initial[index])
        gate.register_hook(lambda gradient, index=index: gradients.update({index: gradient.clone()}))
    with TwoStreams(model, optimizer.gates, sink_size=about["sink"], recent_size=about["recent"]) as streams:
        for step in range(len(about["log"])):
            if f"step{step}.input_ids" not in golden:
                break
            if from_golden:
                for gate, value in zip(optimizer.gates, golden[f"step{step}.alpha"], strict=True):
                    gate.data.copy_(value)
            ids, labels = (golden[f"step{step}.{name}"].to(device) for name in ("input_ids", "labels"))
            hidden = streams(ids)
            found = optimizer.train_step(streams, ids, labels)
            gradient = torch.stack([gradients[index] for index in sorted(gradients)])
            yield step, found, torch.tensor(optimizer.table()), gradient, hidden


def _replay_threshold(path: Path, device: torch.device) -> list[Check]:
    checks = []
    for model, sparsities in json.loads(path.read_text()).items():
        (folder,) = (path.parent / "attn_patterns" / model).iterdir()
        gates = load_pattern(folder).gates
        for sparsity, wanted in sparsities.items():
            full = threshold_gates(gates, sparsity=float(sparsity), seed=42)
            differing = sum(
                ours != (theirs == "1")
                for row, line in zip(full, wanted["rows"], strict=True)
                for ours, theirs in zip(row, line, strict=True)
            )
            checks.append(Check(f"{model}, sparsity {sparsity}: heads that differ", differing, 0.0))
    return checks


def _replay_masks(path: Path, device: torch.device) -> list[Check]:
    checks = []
    for name, wanted in load_file(path).items():
        _, sink, recent = (int(number) for number in re.findall(r"[0-9]+", name))
        head = torch.tensor([-1], dtype=torch.int32)
        ours = visible(head, wanted.shape[0], wanted.shape[1], sink_size=sink, recent_size=recent)
        checks.append(_equal(name, ours.reshape(wanted.shape).int().tolist(), wanted.int().tolist()))
    return checks


def _replay_int4(path: Path, device: torch.device) -> list[Check]:
    golden = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    checks = []
    for case in sorted({name.split(".")[0] for name in golden}):
        size = int(golden[f"{case}.group"])
        codes, scale, zero = kv_quantize(golden[f"{case}.x"], bits=4, group_size=size)
        differing = int((codes != golden[f"{case}.packed"]).sum())
        checks.append(Check(f"{case}: codes that differ", differing, float(golden[f"{case}.near_tie_count"])))
        checks.append(_far(f"{case}: scale", scale, golden[f"{case}.scale"], 0.0))
        checks.append(_far(f"{case}: zero", zero, golden[f"{case}.zero"], 0.0))
        theirs = kv_dequantize(*(golden[f"{case}.{name}"] for name in ("packed", "scale", "zero")), bits=4)
        checks.append(_far(f"{case}: dequantized", theirs, golden[f"{case}.dequant"], 0.0))
    return checks


def _replay_passkeys(path: Path, device: torch.device) -> list[Check]:
    from pronghorn.duoattention.passkey import replay_items

    return [_equal(name, ours, theirs) for name, ours, theirs in replay_items(json.loads(path.read_text()))]


def _replay_pattern(path: Path, device: torch.device) -> list[Check]:
    import tempfile

    from pronghorn.duoattention.pattern import save_pattern

    pattern = load_pattern(path.parent)
    with tempfile.TemporaryDirectory() as folder:
        save_pattern(pattern, folder)
        again = (Path(folder) / path.name).read_text()
        settings = load_pattern(folder).settings
    return [
        _equal("table, read and written", again, path.read_text()),
        _equal("settings", settings, json.loads((path.parent / "config.json").read_text())),
    ]


def _replay_gates(path: Path, device: torch.device) -> list[Check]:
    """Gates that were learned elsewhere: half of the heads must be chosen, whatever the seed."""
    gates = json.loads(path.read_text())["alpha"]
    half = round(0.5 * len(gates) * len(gates[0]))
    full = DuoAttentionConfig(gates=gates, sparsity=0.5).full_heads() or []
    return [Check("heads kept", abs(sum(map(sum, full)) - half), 0.0)]


_KINDS: dict[str, Callable[[Path, torch.device], list[Check]]] = {
    "eval_": _replay_eval,
    "train_": _replay_train,
    "threshold_": _replay_threshold,
    "streaming_masks": _replay_masks,
    "int4_kv": _replay_int4,
    "multi_passkey_data": _replay_passkeys,
    "full_attention_heads": _replay_pattern,
    "smollm2_alpha": _replay_gates,
}
