"""What only AWQ can say of a checkpoint before it is shipped: packing, group size, scales and zero points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from pronghorn.awq.config import METHOD, PUBLISHED_METHOD, AwqConfig
from pronghorn.awq.convert import PACKED, features, read_awq_config
from pronghorn.awq.layers import AwqLinear
from pronghorn.checkpoint import Checkpoint, Finding, failed, ok
from pronghorn.files.tensor_files import opened
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS, unpack_scales

OF_A_LINEAR = (".qweight", ".qzeros", ".scaled_zeros")
REMEDY = "quantize the source again, or fetch the checkpoint again; `pronghorn awq convert` changes formats"


def check_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every packed linear of a checkpoint of ours, of AutoAWQ's or llm-awq's; nothing for others."""
    if not _is_ours(checkpoint):
        return
    try:
        config = read_awq_config(checkpoint.folder)
    except (ValueError, TypeError) as error:
        yield failed("AWQ configuration", str(error), "mend quantization_config in config.json")
        return
    form = f"{config.bits} bits, group size {config.group_size}, version {config.version}"
    yield ok("AWQ configuration", f"{form}{'' if config.zero_point else ', symmetric'}")
    with ExitStack() as stack:
        paths = sorted(checkpoint.folder.glob("*.safetensors"))
        owner = {name: held for path in paths for held in [_opened(stack, path)] for name in held.keys()}  # noqa: SIM118
        # A module's `scales` may be an activation's; zero points are a linear's only.
        linears = sorted({name.rpartition(".")[0] for name in owner if name.endswith(OF_A_LINEAR)})
        if not linears:
            yield failed("AWQ packing", "the configuration says quantized, no tensor is a qweight", REMEDY)
            return
        for linear in linears:
            names = {part: f"{linear}.{part}" for part in PACKED if f"{linear}.{part}" in owner}
            try:
                _check_linear(linear, {part: owner[name].get_tensor(name) for part, name in names.items()}, config)
            except ValueError as error:
                where = "" if str(error).startswith(linear) else f"{linear}: "
                yield failed("AWQ packing", f"{where}{error}", REMEDY)
                return
    yield ok("AWQ packing", f"{len(linears)} linears: shapes, scales and zero points")


def _is_ours(checkpoint: Checkpoint) -> bool:
    found = checkpoint.config.get("quantization_config")
    if found is None:
        return any((checkpoint.folder / name).is_file() for name in ("quant_config.json", "quantize_config.json"))
    return isinstance(found, dict) and found.get("quant_method") in (METHOD, PUBLISHED_METHOD)


def _opened(stack: ExitStack, path: Path) -> Any:
    return stack.enter_context(opened(path))


def _check_linear(linear: str, parts: Mapping[str, Tensor], config: AwqConfig) -> None:
    """Raise ValueError naming the part that cannot be right."""
    from pronghorn.awq.transformers import check_packed

    named = {"qzeros" if part == "scaled_zeros" else part: tensor for part, tensor in parts.items()}
    rows, columns = features(named, config)
    wanted = LAYOUTS[config.layout].shapes(rows, columns, config.group_size, config.bits)
    for name, (shape, dtype) in wanted.items():
        if name not in named:
            raise ValueError(f"{name}: missing; version {config.version} holds {', '.join(wanted)}")
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(named[name].shape)}, wanted {shape} for {config.version}")
        if named[name].dtype != dtype and not (dtype is None and named[name].is_floating_point()):
            raise ValueError(f"{name}: got {named[name].dtype}, wanted {dtype or 'floating numbers'}")
    if set(named) - set(wanted):
        raise ValueError(f"{min(set(named) - set(wanted))}: version {config.version} holds {', '.join(wanted)} only")
    groups = 1 if config.group_size == -1 else columns // config.group_size
    if not bool((unpack_scales(named["scales"], layout=config.layout, groups=groups) != 0).all()):
        raise ValueError("scales: hold 0, with which all weights of a group are 0")
    packed = AwqLinear(columns, rows, bias=False, config=config, dtype=named["scales"].dtype, device="meta")
    for name, tensor in parts.items():
        setattr(packed, name, tensor)
    check_packed(linear, packed)
