"""LoRA and QLoRA: adapters in the wrapped policy while it is trained, and a checkpoint in which they are merged."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.policies import PreTrainedPolicy
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pronghorn.files.tensor_files import load_tensors, save_tensors

FILE, FORMAT = "adapter_model.safetensors", 2
ADAPTER = "default"
# How PEFT's own files name what is inside of a PeftModel.
PEFT_PREFIX = "base_model.model."
TINY = torch.finfo(torch.float32).tiny  # of which a weight of zeros is relative
VLA = ("pi0", "pi05", "smolvla")
TARGETS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2",
]  # fmt: skip
# What is trained as a whole, by parts of its name: layers that see actions, times, states and delays, and norms.
TRAINED = [
    "action_in_proj", "action_out_proj", "time_mlp_", "state_proj", "state_mlp_", "delay_embedding", "embeddings",
    "input_layernorm", "post_attention_layernorm",
]  # fmt: skip


def adapters(policy: PreTrainedPolicy, options: Mapping[str, Any]) -> tuple[LoraConfig, list[str]]:
    """What LeRobot's `--peft` options say.

    Args:
        policy: that is to be trained.
        options: of LeRobot's PeftConfig; None in an option stands for VLASH's default (r = alpha = 16, all projections
            of pi0, pi0.5 and SmolVLA).

    Returns:
        PEFT's configuration, and parts of the names of layers that are trained as a whole.

    Raises:
        ValueError: another method than LoRA, or a policy without default targets and no `target_modules`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    method = str(given.get("method_type", "LORA")).upper()
    if method != "LORA":
        raise ValueError(f"peft.method_type: got {method}, wanted LORA, which can be merged into the checkpoint")
    targets = given.get("target_modules", TARGETS if policy.name in VLA else None)
    if targets is None:
        raise ValueError(f"peft.target_modules: got None, but {policy.name} has no default; name its linear layers")
    rank = given.get("r", 16)
    config = LoraConfig(
        r=rank, lora_alpha=given.get("lora_alpha", rank), lora_dropout=0.0, target_modules=targets,
        init_lora_weights=given.get("init_type", True),
    )  # fmt: skip
    return config, given.get("full_training_modules", TRAINED)


def adapt(
    policy: PreTrainedPolicy, config: LoraConfig, trained: list[str], quantization: str | None = None,
    saved: Path | None = None,
) -> None:  # fmt: skip
    """Freeze a policy, save adapters and what is trained as a whole; changes it in place.

    Args:
        policy: of LeRobot.
        config: of the adapters.
        trained: parts of the names of layers that are trained as a whole.
        quantization: "nf4" or "fp4" for the weights that have adapters, by bitsandbytes.
        saved: the folder of a checkpoint whose adapters go on; the policy's weights are those of that checkpoint, with
            the adapters merged.

    Raises:
        ValueError: a target is no linear layer, or the saved adapters are of another shape.
        ImportError: bitsandbytes is needed and not installed.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"lora_quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes")
    if saved is not None:
        _check_alike(config, LoraConfig.from_pretrained(str(saved)), saved)
    inject_adapter_in_model(config, policy, ADAPTER)  # which freezes everything else
    for name, parameter in policy.named_parameters():
        if ".base_layer." not in name and any(part in name for part in trained):
            parameter.requires_grad_(True)
    for name, layer in _layers(policy).items():
        if type(layer.base_layer) is not nn.Linear:
            raise ValueError(f"peft.target_modules: got {name}, a {type(layer.base_layer).__name__}, wanted nn.Linear")
        # PEFT keeps adapters of a bfloat16 layer in float32.
        layer.to(layer.base_layer.weight.dtype)
    if saved is not None:
        _go_on(policy, load_tensors(saved / FILE, newest=FORMAT)[0])
    if quantization is not None:
        for layer in _layers(policy).values():
            _quantize(layer, quantization)


def save_adapters(policy: PreTrainedPolicy, folder: Path) -> None:
    """Write PEFT's files, which `PeftModel.from_pretrained` reads too, around the policy without its adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.peft_config[ADAPTER].save_pretrained(str(folder))
    weights = get_peft_model_state_dict(policy)
    save_tensors(folder / FILE, {PEFT_PREFIX + name: value for name, value in weights.items()}, format=FORMAT)


def merged(
    policy: PreTrainedPolicy, state: Mapping[str, Tensor], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights with the adapters merged, under the names that they have without adapters.

    Quantized weights are those that they stand for, so the adapters are merged into what they were trained on.

    Args:
        policy: with adapters.
        state: its weights, or those of a module that holds it.
        prefix: before the policy's names in `state`.

    Returns:
        The weights, and by layer the relative error that their dtype's rounding makes of what was trained.
    """
    layers = {prefix + name: layer for name, layer in _layers(policy).items()}
    result, errors = {}, {}
    for name, value in state.items():
        layer, inside, part = name.partition(".base_layer.")
        if not inside:
            if ".lora_" not in name:
                result[name] = value
        elif part == "weight":
            weight = _dequantized(layers[layer].base_layer, value)
            exact = weight.float() + _change(layers[layer], state, layer)
            result[f"{layer}.weight"] = rounded = exact.to(_dtype(layers[layer]))
            errors[layer] = float((rounded.float() - exact).norm() / exact.norm().clamp_min(TINY))
        elif part == "bias":
            result[f"{layer}.bias"] = value
    return result, errors


def _layers(policy: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}


def _change(layer: Any, state: Mapping[str, Tensor], name: str) -> Tensor:
    """What the adapter adds to the weight, float32."""
    down, up = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
    return layer.scaling[ADAPTER] * (up @ down)


def _dtype(layer: Any) -> torch.dtype:
    return layer.lora_A[ADAPTER].weight.dtype


def _go_on(policy: PreTrainedPolicy, weights: dict[str, Tensor]) -> None:
    """Take the adapters out of the merged weights and put them beside."""
    named = {
        name.removeprefix(PEFT_PREFIX).replace(".weight", f".{ADAPTER}.weight"): value
        for name, value in weights.items()
    }
    own = policy.state_dict()
    unknown = sorted(set(named) - set(own)) or sorted(name for name in own if ".lora_" in name and name not in named)
    if unknown:
        raise ValueError(f"{FILE}: the adapters do not fit the policy: {', '.join(unknown[:3])}")
    policy.load_state_dict(named, strict=False)
    for name, layer in _layers(policy).items():
        weight = layer.base_layer.weight
        change = _change(layer, named, name).to(weight.device)
        weight.data = (weight.data.float() - change).to(weight.dtype)


def _check_alike(config: LoraConfig, saved: LoraConfig, folder: Path) -> None:
    for name in ("r", "lora_alpha", "target_modules"):
        old, new = getattr(saved, name), getattr(config, name)
        if old != new:
            raise ValueError(
                f"peft.{name}: got {new}, but the adapters in {folder} have {old}; go on with that, or remove the "
                "folder to begin with new adapters on the merged weights"
            )


def _quantize(layer: Any, kind: str) -> None:
    import bitsandbytes

    linear = layer.base_layer
    device = linear.weight.device
    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16,
        quant_type=kind, device="meta",
    )  # fmt: skip
    quantized.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
    quantized.bias = linear.bias
    # On CPUs with AVX512-BF16 it would lay out weights anew at the first call: of no use to what merges them, and
    # refused where a width is no multiple of 32.
    quantized.support_avx512bf16_for_cpu = False
    layer.base_layer = quantized.to(device)


def _dequantized(linear: Any, weight: Tensor) -> Tensor:
    if not hasattr(linear.weight, "quant_state"):
        return weight
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
