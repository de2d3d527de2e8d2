"""From a full-precision model to its quantized form; scaling and clipping, if wanted, were applied before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.layers import AwqLinear, rounding_dtype
from pronghorn.awq.selection import quantizable_linears
from pronghorn.estimate import Estimate, now, peak_bytes, tensor_bytes, times_tried
from pronghorn.kernels.group_fake_quantize import group_fake_quantize


def quantize_model(
    model: nn.Module, config: AwqConfig, *, dtype: torch.dtype | None = None, progress: bool = True
) -> nn.Module:
    """Replace the linears of all decoder blocks by packed `AwqLinear`s, in place.

    Args:
        model: a transformers causal language model, or one with a language tower.
        config: bits, group size, version and what to leave out.
        dtype: of the scales; see `AwqLinear.from_linear`.
        progress: show a bar.

    Raises:
        ValueError: NaN or Inf in a weight, or a linear that does not fit the group size or the layout. All linears
            are checked before the first is replaced.
    """
    linears = dict(decoder_linears(model, config))
    for name, linear in linears.items():
        check_linear(name, linear, config)
    for name in tqdm(list(linears), desc=f"packing {config.bits}-bit", disable=not progress, unit="linear"):
        # Taken out, so that its weight goes as soon as it is packed.
        model.set_submodule(name, AwqLinear.from_linear(linears.pop(name), config, dtype=dtype, name=name))
    return model


def packed_bytes(model: nn.Module, config: AwqConfig) -> int:
    """Bytes of the weights that `quantize_model` will leave, on disk too."""
    linears = dict(decoder_linears(model, config))
    in_dtype = {"bias": False, "config": config, "device": "meta"}
    packed = [
        AwqLinear(linear.in_features, linear.out_features, dtype=linear.weight.dtype, name=name, **in_dtype)  # type: ignore[arg-type]
        for name, linear in linears.items()
    ]
    stay = tensor_bytes(list(model.state_dict().values()))
    stay -= tensor_bytes([linear.weight for linear in linears.values()])
    return stay + sum(tensor_bytes(list(module.state_dict().values())) for module in packed)


def packing_estimate(model: nn.Module, config: AwqConfig) -> Estimate:
    """What `quantize_model` and saving take: a linear is packed for the time, the rest are shapes."""
    linears = dict(decoder_linears(model, config))
    disk = packed_bytes(model, config)
    name, largest = max(linears.items(), key=lambda item: item[1].weight.numel())
    alike = sum(linear.weight.numel() for linear in linears.values()) / largest.weight.numel()
    device = largest.weight.device
    for _ in range(times_tried(device)):
        started = now(device)
        AwqLinear.from_linear(largest, config, name=name)
        seconds = (now(device) - started) * alike
    return Estimate(peak_bytes(device), disk, seconds, f"one of {len(linears)} linears was packed")


def fake_quantize_model(model: nn.Module, config: AwqConfig) -> nn.Module:
    """Round the linears of all decoder blocks to their quantization grid, in place, leaving them `nn.Linear`s."""
    for name, linear in decoder_linears(model, config):
        check_linear(name, linear, config)
        weight = linear.weight.detach()
        fake, _, _ = group_fake_quantize(
            weight.to(rounding_dtype(weight.dtype)),
            bits=config.bits,
            group_size=config.group_size,
            symmetric=not config.zero_point,
        )
        linear.weight.data.copy_(fake)
    return model


def decoder_linears(model: nn.Module, config: AwqConfig) -> Iterator[tuple[str, nn.Linear]]:
    """Full name and module of every linear that the configuration quantizes; experts are taken apart first.

    Raises:
        ValueError: the model is quantized already.
    """
    # Importing the integration registers all methods, this one included: not while this room is being imported.
    from pronghorn.transformers.decoder import find_decoder_blocks
    from pronghorn.transformers.experts import unfuse_experts

    unfuse_experts(model)
    blocks = find_decoder_blocks(model)
    if hasattr(model, "awq_fused") or any(isinstance(part, AwqLinear) for b in blocks for part in b.module.modules()):
        raise ValueError(
            f"model: {type(model).__name__} has packed linears already; quantize the checkpoint that it was made from"
        )
    for block in blocks:
        found = quantizable_linears(block.module, config.modules_to_not_convert, prefix=block.name)
        for name, linear in found.items():
            yield f"{block.name}.{name}", linear


def check_linear(name: str, linear: nn.Linear, config: AwqConfig) -> None:
    """Raise ValueError if a linear cannot be quantized as configured."""
    AwqLinear(linear.in_features, linear.out_features, bias=False, config=config, device="meta", name=name)
    if linear.weight.device.type != "meta" and not bool(linear.weight.isfinite().all()):
        raise ValueError(f"{name}.weight: holds NaN or Inf")
