"""Replays what the official implementation computed (`golden/torchsparse`), file by file, on the user's own device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pronghorn.kernels.sparse_convolution.sorting import bitmasks, reduced
from pronghorn.torchsparse import backbones
from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.grouping import group_offsets
from pronghorn.torchsparse.hashing import spcount, sphash
from pronghorn.torchsparse.kernel_maps import (
    KernelMap,
    build_kernel_map,
    geometry_of,
    get_kernel_offsets,
    out_spatial_range,
)
from pronghorn.torchsparse.quantize import sparse_quantize
from pronghorn.torchsparse.tensor import SparseTensor
from pronghorn.torchsparse.voxelize import calc_ti_weights, spdevoxelize, spvoxelize
from pronghorn.verification import Check

FAR = 2e-5  # of the largest number
GOLDEN_GROUPS = 3
Golden = dict[str, Tensor]


def cases(folder: Path) -> list[Path]:
    """The golden files of a folder."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.tsv")])


def replay(path: Path, device: torch.device | str = "cpu") -> list[Check]:
    """Compare our results with one golden file.

    Args:
        path: the file; its kind is told by how its name starts.
        device: where our side runs.

    Raises:
        ValueError: a kind of file that is not known, or something in it. It is never passed over.
    """
    for prefix, function in _KINDS.items():
        if path.name.startswith(prefix):
            # Multiplied exactly: that is what the reference did.
            before, settings.allow_tf32 = settings.allow_tf32, False
            try:
                return list(function(path, torch.device(device)))
            finally:
                settings.allow_tf32 = before
    raise ValueError(f"{path.name}: unknown kind of golden file; known are {', '.join(_KINDS)}")


def _load(path: Path, device: torch.device) -> tuple[Golden, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if value[:1] in "[{"}
        return {key: file.get_tensor(key).to(device) for key in file.keys()}, about  # noqa: SIM118 - no mapping


def _far(name: str, ours: Tensor, theirs: Tensor, tolerance: float = FAR) -> Check:
    if ours.shape != theirs.shape:
        return Check(f"{name}: {tuple(ours.shape)} for {tuple(theirs.shape)}", 1.0, 0.0)
    if not theirs.numel():
        return Check(name, 0.0, tolerance)
    error = (ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)
    return Check(name, float(error), tolerance)


def _equal(name: str, ours: Any, theirs: Any) -> Check:
    same = torch.equal(ours.to(theirs.device), theirs) if isinstance(theirs, Tensor) else ours == theirs
    return Check(name, 0.0 if same else 1.0, 0.0)


def _maps(path: Path, device: torch.device) -> Iterator[Check]:
    golden, about = _load(path, device)
    coords = golden["in.coords"]
    for case, knobs in about["cases"].items():
        x = SparseTensor(coords.new_zeros(len(coords), 1).float(), coords, spatial_range=knobs["spatial_range"])
        geometry = geometry_of(
            *(tuple(knobs[name]) for name in ("kernel_size", "stride", "padding")), 1, coords.shape[1] - 1,
            knobs["kmap_mode"], knobs["downsample_mode"],
        )  # fmt: skip
        found = build_kernel_map(x, geometry)
        sizes = knobs.get("new_spatial_range")
        yield _equal(f"{case}.new_spatial_range", out_spatial_range(x.spatial_range, geometry),
                     None if sizes is None else tuple(sizes))  # fmt: skip
        parts = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
        for name, theirs in parts.items():
            yield _equal(f"{case}.{name}", _part(name, found, theirs), theirs)


def _part(name: str, found: KernelMap, theirs: Tensor) -> Tensor:
    """What a golden tensor of a kernel map shows."""
    plain: dict[str, Callable[[], Tensor]] = {
        "out_coords": lambda: found.coords[1],
        "out_in_map": lambda: found.out_in_map,
        "out_in_map_bwd": lambda: found.out_in_map_bwd,
        "nbmaps": lambda: found.pairs[0].T,
        "nbsizes": lambda: found.pairs[1].diff(),
        "nbaddrs": lambda: found.pairs[1],
        "qnbaddrs": lambda: _starts((found.pairs[1].diff() + 127) // 128 * 128),
    }
    if name in plain:
        return plain[name]()
    kind, _, splits = name.rpartition("_split")
    if kind not in ("bitmask", "sorted_mask", "reduced128"):
        raise ValueError(f"{name}: unknown part of a kernel map")
    masks = bitmasks(found.found, int(splits))
    if kind == "bitmask":  # rows that fill up have all bits
        return torch.nn.functional.pad(masks, (0, theirs.shape[1] - masks.shape[1]), value=-1)
    ordered = masks.sort(dim=1, descending=True).values
    if kind == "sorted_mask":
        return torch.nn.functional.pad(ordered, (0, theirs.shape[1] - ordered.shape[1]), value=-1)
    filled = torch.nn.functional.pad(ordered, (0, -ordered.shape[1] % 128), value=-1)
    return reduced(filled, 128)


def _starts(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()


def _layers(path: Path, device: torch.device) -> Iterator[Check]:
    golden, about = _load(path, device)
    for case, knobs in about["cases"].items():
        ours = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
        yield from _layer(case, knobs, golden["in.coords"], ours)


def _layer(case: str, knobs: dict[str, Any], coords: Tensor, golden: Golden) -> Iterator[Check]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "bias")
    options = {name: knobs[name] for name in names}
    layer = spnn.Conv3d(**options).to(coords.device)
    layer.load_state_dict({key[2:]: value for key, value in golden.items() if key.startswith("w.")})
    x = golden["x"].clone().requires_grad_()
    y = layer(SparseTensor(x, coords))
    y.feats.backward(golden["gy"])
    yield _far(f"{case}.y", y.feats, golden["y"])
    yield _equal(f"{case}.y_coords", y.coords, golden["y_coords"])
    yield _equal(f"{case}.out_stride", list(y.stride), knobs["out_stride"])
    for name, gradient in (("gx", x.grad), ("gkernel", layer.kernel.grad)):
        yield _far(f"{case}.{name}", gradient, golden[name])  # type: ignore[arg-type]
    if "t.y" in golden:
        options.update(in_channels=knobs["out_channels"], out_channels=knobs["in_channels"], bias=False)
        back = spnn.Conv3d(**options, transposed=True).to(coords.device)
        back.load_state_dict({"kernel": golden["t.w.kernel"]})
        again = back(y)
        yield _far(f"{case}.t.y", again.feats, golden["t.y"])
        yield _equal(f"{case}.t.y_coords", again.coords, golden["t.y_coords"])
        yield _equal(f"{case}.t_stride", list(again.stride), knobs["t_stride"])


def _network(path: Path, device: torch.device) -> Iterator[Check]:
    golden, about = _load(path, device)
    config = dict(about["config"])
    name, strides = config.pop("name"), config.pop("strides")
    model = getattr(backbones, name)(**config).to(device).eval()
    weights = {key[2:]: value.float() for key, value in golden.items() if key.startswith("w.")}
    missing = model.load_state_dict(weights, strict=False)
    yield _equal("keys", [*missing.unexpected_keys, *(key for key in missing.missing_keys if "num_b" not in key)], [])
    with torch.no_grad():
        outputs = model(SparseTensor(golden["in.feats"], golden["in.coords"]))
    yield _equal("strides", [list(output.stride) for output in outputs], strides)
    for index, output in enumerate(outputs):
        yield _far(f"out.{index}.feats", output.feats, golden[f"out.{index}.feats"], 1e-4)
        yield _equal(f"out.{index}.coords", output.coords, golden[f"out.{index}.coords"])


def _keys(path: Path, device: torch.device) -> Iterator[Check]:
    model = getattr(backbones, path.stem.removeprefix("keys_"))(in_channels=4)
    ours = {key: str(list(value.shape)) for key, value in model.state_dict().items()}
    theirs = dict(line.split("\t") for line in path.read_text().splitlines() if line)
    yield _equal(f"{path.stem}: names and shapes", ours, theirs)


def _groups(path: Path, device: torch.device) -> Iterator[Check]:
    for index, plan in enumerate(json.loads(path.read_text())):
        found = group_offsets(
            plan["nbsizes"], epsilon=plan["epsilon"], mm_thresh=plan["mm_thresh"], pairwise=plan["conv_mode"] == 2,
            without_centre=plan["precompute_mid"],
        )  # fmt: skip
        yield _equal(f"{index}.groups", found.members, plan["groups"])
        yield _equal(f"{index}.use_bmm", [int(together) for together in found.batched], plan["use_bmm"])
        yield _equal(f"{index}.group_sizes", found.sizes, plan["group_sizes"])
        yield _equal(f"{index}.cum_buffer", found.starts, plan["cum_buffer"])
        yield _equal(f"{index}.buffer_rows", found.rows, plan["buffer_rows"])


def _misc(path: Path, device: torch.device) -> Iterator[Check]:
    golden, _ = _load(path, device)
    yield from _hashes(golden)
    yield from _voxels(golden)
    yield from _functions(golden)
    for key, theirs in golden.items():
        if key.startswith("offsets."):
            size = json.loads(key.removeprefix("offsets.").replace("(", "[").replace(")", "]"))
            yield _equal(key, get_kernel_offsets(size if isinstance(size, int) else tuple(size)), theirs)
    known = {"hash", "vox", "devox", "quant", "misc", "offsets", "gen"}
    unknown = {key for key in golden if key.split(".")[0] not in known}
    if unknown:
        raise ValueError(f"{path.name}: nobody knows how to replay {', '.join(sorted(unknown))}")


def _hashes(golden: Golden) -> Iterator[Check]:
    coords = golden["hash.coords"]
    yield _equal("hash.cpu", sphash(coords, folded=True), golden["hash.cpu"])
    yield _equal("hash.cuda", sphash(coords, folded=False), golden["hash.cuda"])
    yield _equal("hash.kernel", sphash(coords, golden["hash.offsets"], folded=False), golden["hash.kernel_cuda"])


def _voxels(golden: Golden) -> Iterator[Check]:
    counts = spcount(golden["vox.idx"], len(golden["vox.counts"]))
    yield _equal("vox.counts", counts, golden["vox.counts"])
    yield _far("vox.out", spvoxelize(golden["vox.feats"], golden["vox.idx"], counts), golden["vox.out"])
    for name, scale in (("", 1), ("_s2", 2)):
        weights = calc_ti_weights(golden[f"devox.points{name}"], golden["devox.idx"], scale)
        yield _far(f"devox.weights{name}", weights, golden[f"devox.weights{name}"])
    found = spdevoxelize(golden["devox.vox"], golden["devox.idx"], golden["devox.weights"])
    yield _far("devox.out", found, golden["devox.out"])
    quantized = sparse_quantize(golden["quant.points"], 0.5, return_index=True, return_inverse=True)
    for name, ours in zip(("coords", "index", "inverse"), quantized, strict=True):
        yield _equal(f"quant.{name}", ours, golden[f"quant.{name}"])


def _functions(golden: Golden) -> Iterator[Check]:
    feats, coords = golden["misc.feats"], golden["misc.coords"]
    batch, *sizes, channels = golden["misc.dense_bxyzc"].shape
    x = SparseTensor(feats, coords, spatial_range=(batch, *sizes))
    yield _equal("misc.dense", x.dense(), golden["misc.dense_bxyzc"])
    yield _far("misc.globalavg", spnn.functional.global_avg_pool(x), golden["misc.globalavg"])
    yield _equal("misc.globalmax", spnn.functional.global_max_pool(x), golden["misc.globalmax"])
    norm = spnn.GroupNorm(GOLDEN_GROUPS, channels).to(feats.device)
    norm.load_state_dict({key: golden[f"misc.gn.{key}"] for key in ("weight", "bias")})
    yield _far("misc.groupnorm", norm(x).feats, golden["misc.groupnorm"])
    # The reference took the first three columns, which are batch, x and y since the batch index is first.
    cropped = spnn.functional.spcrop(x, (1, 2, None), (6, 6, None))
    for name, ours in (("coords", cropped.coords), ("feats", cropped.feats)):
        yield _equal(f"misc.crop_official.{name}", ours, golden[f"misc.crop_official.{name}"])
    shifted = SparseTensor(feats, coords[:, [0, 0, 1, 2]].contiguous())
    height = spnn.ToBEVHeightCompression(channels, tuple(sizes), dim=2)
    yield _equal("misc.bev_height", height(shifted), golden["misc.bev_height"])
    kernel = golden["misc.densebev.kernel"]
    layer = spnn.ToDenseBEVConvolution(channels, kernel.shape[2], tuple(sizes), dim=2).to(feats.device)
    layer.load_state_dict({"kernel": kernel}, strict=False)
    yield _far("misc.densebev.out", layer(shifted), golden["misc.densebev.out"])
    if "gen.y" in golden:
        yield from _generative(golden)


def _generative(golden: Golden) -> Iterator[Check]:
    """The reference clamps sites to the input's range, so that most are wrong; here is what they should be."""
    kernel, coords, feats = golden["gen.kernel"], golden["gen.coords"], golden["gen.feats"]
    layer = spnn.Conv3d(kernel.shape[1], kernel.shape[2], 2, stride=2, generative=True).to(coords.device)
    layer.load_state_dict({"kernel": kernel})
    ours = layer(SparseTensor(feats, coords, 2, tuple((coords.amax(dim=0) + 1).tolist())))
    corners = torch.nn.functional.pad(get_kernel_offsets(2, device=coords.device), (1, 0))
    sites = (coords * coords.new_tensor([1, 2, 2, 2]))[:, None] + corners
    made = torch.einsum("nc,kcd->nkd", feats, kernel)
    order = {tuple(site): row for row, site in enumerate(sites.flatten(0, 1).tolist())}
    rows = torch.tensor([order.get(tuple(site), -1) for site in ours.coords.tolist()], device=coords.device)
    yield _equal("gen.coords", rows.sort().values, torch.arange(len(order), device=coords.device))
    yield _far("gen.y", ours.feats, made.flatten(0, 1)[rows])


_KINDS: dict[str, Callable[[Path, torch.device], Iterator[Check]]] = {
    "kernel_maps_": _maps, "layers_": _layers, "sparseres": _network, "keys_": _keys, "adaptive_groups": _groups,
    "misc_": _misc,
}  # fmt: skip
