"""Turns a quantized checkpoint of one format into another, without loss, a linear at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pronghorn.awq.config import AwqConfig
from pronghorn.checkpoint.written import write_checkpoint
from pronghorn.estimate import Estimate, in_turn, of_pieces, peak_bytes
from pronghorn.files.json_files import parse_json
from pronghorn.files.room import check_target
from pronghorn.files.sealed import INDEX as SEAL
from pronghorn.files.sealed import check_seal
from pronghorn.files.tensor_files import opened
from pronghorn.kernels.dequantize_weight.layouts import pack, unpack

PICKLED = (".bin", ".pt")
PACKED = ("qweight", "qzeros", "scaled_zeros", "scales")
INDEX = "model.safetensors.index.json"


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    version: str,
    *,
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[Path], str | None] | None = None,
) -> AwqConfig:
    """Write the checkpoint in `source` to `target` in another format; codes, scales and zero points stay what they are.

    Args:
        source: folder with `config.json` (or `quant_config.json`) and safetensors, or llm-awq's `.pt`.
        target: folder to make. It appears when it is whole, or not at all.
        version: a format of `AwqConfig.version`.
        overwrite: replace an existing `target`.
        progress: show a bar.
        report: writes what there is to say of the new checkpoint beside it, before it appears.

    Returns:
        The configuration of the new checkpoint.

    Raises:
        ValueError: no quantized checkpoint, a damaged file, or a format that cannot hold it (3 bits in "gemm", zero
            points in "marlin").
        FileExistsError: `target` exists.
        OSError: no room or no permission for it; nothing is left behind.
    """
    source, target = Path(source), Path(target)
    check_conversion(source, target, overwrite)
    check_seal(source)
    model_config, old = _read_config(source)
    new = AwqConfig.from_dict({**old.to_dict(), "version": version})
    files = _weight_files(source)

    def save(folder: Path) -> None:
        _convert_weights(files, folder, old, new, progress=progress)
        for path in _other_files(source):
            shutil.copy2(path, folder / path.name)
        model_config["quantization_config"] = new.to_dict()
        (folder / "config.json").write_text(json.dumps(model_config, indent=2, sort_keys=True) + "\n")

    needed = sum(path.stat().st_size for path in (*files, *_other_files(source)))  # repacked, it is about as much
    write_checkpoint(target, save, needed=needed, report=report, overwrite=overwrite)
    return new


def check_conversion(source: Path, target: Path, overwrite: bool) -> None:
    """See whether a checkpoint can be converted into a folder, before it is read.

    Raises:
        ValueError: the source would be lost.
        FileExistsError: `target` exists.
        OSError: it cannot be made.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; give overwrite=True to replace it")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"target: {target} is or holds the source, which would be lost")
    check_target(target)


def conversion_estimate(source: Path, version: str) -> Estimate:
    """What `convert_checkpoint` and its report take, from some linears and some other tensors.

    Raises:
        ValueError: see `convert_checkpoint`; of the weights only what is tried is looked at.
    """
    _, old = _read_config(source)
    new = AwqConfig.from_dict({**old.to_dict(), "version": version})
    files, before = _weight_files(source), peak_bytes("cpu")
    read, beside = (sum(path.stat().st_size for path in paths) for paths in (files, _other_files(source)))
    parts, touched, written = [], {}, []
    with ExitStack() as stack:
        checkpoint = [stack.enter_context(_opened(path)) for path in files]
        owner = {name: held for held in checkpoint for name in held}
        sizes = {name: held[name].nbytes for name, held in owner.items()}
        for kind, pieces in _pieces(owner).items():

            def work(index: int, pieces: list[list[str]] = pieces) -> int:
                touched.update({name: sizes[name] for name in pieces[index]})
                written.append(_try_piece({name: owner[name][name] for name in pieces[index]}, old, new))
                return written[-1]

            if pieces:
                parts.append(of_pieces([sum(map(sizes.__getitem__, names)) for names in pieces], work, "cpu", kind))
    found = in_turn(parts)
    # In the end both checkpoints are in memory, as the system reads files; what was tried of them was there already.
    there = max(written) + (sum(touched.values()) if files[0].suffix not in PICKLED else read)
    memory = before + read + found.disk_bytes + max(0, peak_bytes("cpu") - before - there)
    return replace(found, memory_bytes=memory, disk_bytes=found.disk_bytes + beside)


def read_awq_config(folder: str | os.PathLike[str]) -> AwqConfig:
    """The quantization configuration of a checkpoint folder.

    Raises:
        ValueError: there is none, or it is of another method.
    """
    return _read_config(Path(folder))[1]


def _read_config(folder: Path) -> tuple[dict[str, Any], AwqConfig]:
    path = folder / "config.json"
    model_config = parse_json(path.read_bytes(), path) if path.is_file() else {}
    if not isinstance(model_config, dict):
        raise ValueError(f"{path}: got {type(model_config).__name__}, wanted an object")
    found = model_config.get("quantization_config")
    for side_file in ("quant_config.json", "quantize_config.json"):
        if found is None and (folder / side_file).is_file():
            path = folder / side_file
            found = parse_json(path.read_bytes(), path)
    if found is None:
        raise ValueError(f"{folder}: no quantization_config in config.json and no quant_config.json")
    try:
        return model_config, AwqConfig.from_dict(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for endings in ((".safetensors",), PICKLED):
        files = sorted(path for path in folder.iterdir() if path.suffix in endings)
        if files:
            return files
    raise ValueError(f"{folder}: no .safetensors, .bin or .pt file")


def _safetensors_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _convert_weights(files: list[Path], folder: Path, old: AwqConfig, new: AwqConfig, *, progress: bool) -> None:
    """Write all weights into a folder, with an index where there are several files."""
    weight_map: dict[str, str] = {}
    with ExitStack() as stack:
        # A linear's tensors may lie in different files.
        checkpoint = {path: stack.enter_context(_opened(path)) for path in files}
        for number, path in enumerate(tqdm(files, desc=f"{old.version} to {new.version}", disable=not progress)):
            name = path.name if path.suffix == ".safetensors" else _safetensors_name(number, len(files))
            converted = _convert_file(path, checkpoint, old, new)
            save_file(converted, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(converted, name)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _convert_file(
    path: Path, checkpoint: Mapping[Path, Mapping[str, Tensor]], old: AwqConfig, new: AwqConfig
) -> dict[str, Tensor]:
    """What the converted file holds: each linear whose codes are in `path`, and all other tensors of `path`."""
    tensors = checkpoint[path]
    owner = {name: held for held in checkpoint.values() for name in held}
    all_linears = {name.removesuffix(".qweight") for name in owner if name.endswith(".qweight")}
    converted = {}
    for name in tensors:
        linear, _, part = name.rpartition(".")
        if linear not in all_linears and part in ("qzeros", "scaled_zeros"):
            raise ValueError(f"{path.name}: {name}: there is no {linear}.qweight to it")
        if linear not in all_linears or part not in PACKED:
            converted[name] = tensors[name]
        elif part == "qweight":
            stored = (f"{linear}.{part}" for part in PACKED)
            parts = {key.rpartition(".")[2]: owner[key][key] for key in stored if key in owner}
            try:
                repacked = _repack(parts, old, new)
            except ValueError as error:
                raise ValueError(f"{path.name}: {linear}: {error}") from error
            converted |= {f"{linear}.{part}": tensor.contiguous() for part, tensor in repacked.items()}
    return converted


def unpacked_tensors(folder: Path) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Of a checkpoint, by name: a linear's codes, scales and zero points, or any other tensor as it is.

    Codes, scales and zero points are as `dequantize_weight.layouts.unpack` gives them.

    Raises:
        ValueError: no quantized checkpoint, or a damaged file.
    """
    config = read_awq_config(folder)
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in _weight_files(folder)]
        owner = {name: held for held in files for name in held}
        linears = {name.removesuffix(".qweight") for name in owner if name.endswith(".qweight")}
        parts = {f"{linear}.{part}" for linear in linears for part in PACKED}
        for name in sorted({*owner, *linears} - parts):
            if name not in linears:
                yield name, (owner[name][name],)
                continue
            stored = [key for key in (f"{name}.{part}" for part in PACKED) if key in owner]
            yield name, _unpacked({key.rpartition(".")[2]: owner[key][key] for key in stored}, config)


def _unpacked(parts: Mapping[str, Tensor], config: AwqConfig) -> tuple[Tensor, Tensor, Tensor]:
    named = {"qzeros" if part == "scaled_zeros" else part: tensor for part, tensor in parts.items()}
    rows, columns = features(named, config)
    how: dict[str, Any] = {"bits": config.bits, "group_size": config.group_size}
    return unpack(named, layout=config.layout, out_features=rows, in_features=columns, **how)


def _repack(parts: Mapping[str, Tensor], old: AwqConfig, new: AwqConfig) -> dict[str, Tensor]:
    unpacked = _unpacked(parts, old)
    if not parts["scales"].is_floating_point():
        raise ValueError(f"scales: got {parts['scales'].dtype}, wanted numbers of floating point")
    if not bool(parts["scales"].isfinite().all()):
        raise ValueError("scales: hold NaN or Inf")
    if not bool((unpacked[1] > 0).all()):
        raise ValueError("scales: hold numbers that are not positive")
    if int(unpacked[2].max()) >> old.bits:
        raise ValueError(f"qzeros: a zero point above {2**old.bits - 1}")
    packed = pack(*unpacked, layout=new.layout, bits=old.bits, group_size=old.group_size)
    if new.version == "llm-awq":
        packed["scaled_zeros"] = packed.pop("qzeros")
    return packed


def features(tensors: Mapping[str, Tensor], config: AwqConfig) -> tuple[int, int]:
    """(N, K) of a weight from the shapes of its packed tensors, named as `LAYOUTS` names them.

    Raises:
        ValueError: a tensor is missing, or not a matrix.
    """
    for name in ("qweight", "scales"):
        if name not in tensors:
            raise ValueError(f"{name}: missing")
        if tensors[name].dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(tensors[name].shape)}, wanted two dimensions")
    first, second = tensors["qweight"].shape
    if config.layout == "natural" and config.group_size != -1:
        return second, tensors["scales"].shape[0] * config.group_size  # the words may be padded
    return {
        "gemm": (second * 8, first),
        "gemv": (first, second * 8),
        "gemv_fast": (first * 4, second),
        "exllama": (second, first * 8),
        "marlin": (second // 2, first * 16),
        "natural": (second, first * 32 // config.bits),
    }[config.layout]


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Tensor]]:
    if path.suffix in PICKLED:
        from pronghorn.transformers.quantizer import pickled_tensors

        yield pickled_tensors(path)
        return
    with opened(path) as file:
        yield _LazyTensors(file)


def _pieces(names: Iterable[str]) -> dict[str, list[list[str]]]:
    """Names of tensors that are converted together, by their kind."""
    names = set(names)
    linears = sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
    packed = [[name for part in PACKED if (name := f"{linear}.{part}") in names] for linear in linears]
    others = sorted(names.difference(*packed))
    return {"linears": packed, "other tensors": [[name] for name in others]}


def _try_piece(tensors: Mapping[str, Tensor], old: AwqConfig, new: AwqConfig) -> int:
    """Convert a linear or another tensor, digest and read it as the whole is, and throw it away; bytes of its file."""
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    is_linear = "qweight" in parts
    converted = _repack(parts, old, new) if is_linear else dict(tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in converted.items()}, path)
        for _ in ("the source's", "its own"):
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        with _opened(path) as again:
            before, after = (
                (_unpacked(parts, old), _unpacked(again, new)) if is_linear else (tensors.values(), again.values())
            )
            for one, other in zip(before, after, strict=True):
                torch.equal(one, other)
        return path.stat().st_size


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, read when they are asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _other_files(source: Path) -> Iterator[Path]:
    """Tokenizer, generation settings and the like; not weights, their index, or configurations that are rewritten."""
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", *PICKLED) or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in ("config.json", "quant_config.json", SEAL):
            yield path
