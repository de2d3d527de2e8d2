"""Replays what the official implementations computed (`golden/awq`), file by file, on the user's own device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pronghorn.awq.verify_search import replay_search
from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.dequantize_weight.layouts import pack, pack_codes, unpack
from pronghorn.kernels.group_fake_quantize import group_fake_quantize, group_quantize
from pronghorn.kernels.w4a16_matmul import w4a16_matmul
from pronghorn.verification import Check

AUTOAWQ_LAYOUTS = ("gemm", "gemv", "gemv_fast", "exllama")
PRODUCT_TOLERANCE = 1e-3


def replay(path: Path, device: torch.device | str = "cpu") -> list[Check]:
    """Compare our results with one golden file.

    Args:
        path: a `.safetensors` file; its kind is told by how its name starts.
        device: where our side runs. Searches run on the CPU, as the official ones did: near-ties between clip maxima
            fall differently elsewhere.

    Raises:
        ValueError: a kind of file that is not known. It is never passed over.
    """
    device = torch.device(device)
    for prefix, function in _KINDS.items():
        if path.name.startswith(prefix):
            return function(path, torch.device("cpu") if function is replay_search else device)
    raise ValueError(f"{path.name}: unknown kind of golden file; known are {', '.join(_KINDS)}")


def cases(folder: Path) -> list[Path]:
    """The golden files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def _load(path: Path, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in load_file(path).items()}


def _differing(name: str, ours: Tensor, theirs: Tensor) -> Check:
    """Share of elements that are not equal; 1 where shapes or dtypes differ."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Check(f"{name}: {ours.dtype} {tuple(ours.shape)} for {theirs.dtype} {tuple(theirs.shape)}", 1.0, 0.0)
    return Check(name, (ours != theirs).double().mean().item(), 0.0)


def _replay_codes_only(path: Path, device: torch.device) -> list[Check]:
    golden = _load(path, device)
    suffixes = [name.removeprefix("codes") for name in golden if name.startswith("codes")]
    return [
        _differing(
            f"qweight{suffix}",
            pack_codes(golden[f"codes{suffix}"].to(torch.uint8), layout="gemv_fast", bits=4),
            golden[f"qweight{suffix}"],
        )
        for suffix in suffixes
    ]


def _replay_pack_v2(path: Path, device: torch.device) -> list[Check]:
    golden = _load(path, device)
    weight = golden["weight"]
    group_size = weight.shape[1] // golden["group_scales"].shape[1]
    codes, scales, zeros = group_quantize(weight, bits=4, group_size=group_size)
    tensors = pack(codes, scales, zeros, layout="gemv_fast", bits=4, group_size=group_size)
    checks = [
        _differing("group_scales", scales, golden["group_scales"]),
        _differing("group_zeros", zeros.to(weight.dtype), golden["group_zeros"]),
        _differing("qweight", tensors["qweight"], golden["qweight"]),
        _differing("scales", tensors["scales"], golden["scales"]),
        _differing("scaled_zeros", tensors["qzeros"], golden["scaled_zeros"]),
    ]
    if "packed_bias" in golden:
        checks.append(_differing("bias", golden["bias"], golden["packed_bias"]))
    return checks


def _replay_repack(path: Path, device: torch.device) -> list[Check]:
    golden = _load(path, device)
    v1 = {name.removeprefix("v1."): tensor for name, tensor in golden.items() if name.startswith("v1.")}
    rows, columns = golden["codes"].shape
    group_size = _group_size_of_name(path, columns)
    codes, scales, zeros = unpack(
        v1, layout="gemv", bits=4, group_size=group_size, out_features=rows, in_features=columns
    )
    v2 = pack(codes, scales, zeros, layout="gemv_fast", bits=4, group_size=group_size)
    back = pack(codes, scales, zeros, layout="gemv", bits=4, group_size=group_size)
    return [
        _differing("codes", codes, golden["codes"]),
        _differing("v2.qweight", v2["qweight"], golden["v2.qweight"]),
        _differing("v2.scales", v2["scales"], golden["v2.scales"]),
        _differing("v2.scaled_zeros", v2["qzeros"], golden["v2.scaled_zeros"]),
        *(_differing(f"v1.{name} again", tensor, v1[name]) for name, tensor in back.items()),
    ]


def _group_size_of_name(path: Path, columns: int) -> int:
    size = int(path.stem.rsplit("_g", 1)[1].split("_")[0])
    return columns if size == -1 else size


def _replay_pseudo_quant(path: Path, device: torch.device) -> list[Check]:
    golden = _load(path, device)
    checks = []
    for name in golden:
        setting, _, part = name.partition(".")
        if part != "fake":
            continue
        bits, group_size = (int(number) for number in setting.removeprefix("w").split("g"))
        results = group_fake_quantize(golden["weight"], bits=bits, group_size=group_size)
        for key, tensor in zip(("fake", "scales", "zeros"), results, strict=True):
            checks.append(_differing(f"{setting}.{key}", tensor, golden[f"{setting}.{key}"]))
    return checks


def _replay_autoawq_pack(path: Path, device: torch.device) -> list[Check]:
    golden = _load(path, device)
    rows, columns = golden["weight"].shape
    group_size = columns // golden["gemm.scales"].shape[0]
    codes, scales, zeros = group_quantize(golden["weight"], bits=4, group_size=group_size)
    checks = []
    for layout in AUTOAWQ_LAYOUTS:
        stored = {name.partition(".")[2]: t for name, t in golden.items() if name.partition(".")[0] == layout}
        tensors = pack(codes, scales, zeros, layout=layout, bits=4, group_size=group_size)
        checks += [_differing(f"{layout}.{key}", tensors[key], stored[key]) for key in tensors if key in stored]
        how: dict[str, Any] = {"layout": layout, "bits": 4, "group_size": group_size, "out_features": rows}
        product = w4a16_matmul(golden["x"].float(), **_arguments(tensors), **how, bias=golden.get("bias"))
        wanted = golden["y_ref_fp32"]
        error = ((product - wanted).norm() / wanted.norm()).item()
        checks.append(Check(f"{layout}: product", error, PRODUCT_TOLERANCE))
        if layout == "gemm":
            dequantized = dequantize_weight(**_arguments(tensors), **how, in_features=columns)
            checks.append(_differing("gemm.dequant", dequantized.T, golden["gemm.dequant"]))
    return checks


def _arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"qzeros": None, **tensors}


_KINDS: dict[str, Callable[[Path, torch.device], list[Check]]] = {
    "pack_v2_codes_only": _replay_codes_only,
    "pack_v2_": _replay_pack_v2,
    "repack_v1_to_v2_": _replay_repack,
    "pseudo_quant_": _replay_pseudo_quant,
    "autoawq_pack_": _replay_autoawq_pack,
    "autoawq_search_": replay_search,
    "search_": replay_search,
}
