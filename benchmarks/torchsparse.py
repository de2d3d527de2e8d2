"""Sparse convolution on synthetic LiDAR scans against SpConv 2 and spconv-triton: networks, layers, maps.

One description of each network is built from the layers of each library. All compute in fp16 and build their kernel
maps anew for every scan; ours as a CUDA graph, and layer by layer. A library that is not installed is left out.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import device, measure, median, row, write
from lidar_scenes import scan
from torch import Tensor, nn

import pronghorn.torchsparse as ts

PEERS = {"SpConv 2": "spconv.pytorch", "spconv-triton": "spconv_triton.pytorch"}
# Name, sweeps, voxel size in metres: about 40 and 120 thousand voxels, and ten sweeps.
SCANS = {"40K": (1, 0.15), "100K": (1, 0.05), "10 sweeps": (10, 0.1)}
REACH = {("inference", "SpConv 2"): 1.7, ("inference", "spconv-triton"): 1.3,
         ("training", "SpConv 2"): 1.3, ("training", "spconv-triton"): 1.2}  # fmt: skip
REPEATS, WARM_UP = 20, 5
TURNS = 3
EAGER = "ours, layer by layer"


class Ours:
    """Layers of this library; networks of them run as CUDA graphs, or layer by layer.

    Args:
        graphed: whether they run as CUDA graphs.
    """

    def __init__(self, *, graphed: bool = True) -> None:
        self.graphed = graphed

    def tensor(self, feats: Tensor, coords: Tensor, sizes: tuple[int, ...]) -> Any:
        """A sparse tensor."""
        return ts.SparseTensor(feats, coords, spatial_range=sizes)

    def conv(
        self, a: int, b: int, size: Any, stride: Any, key: str, *, up: bool = False, padding: Any = 0
    ) -> nn.Module:
        """Convolution, batch norm, ReLU."""
        layer = ts.nn.Conv3d(a, b, size, stride=stride, padding=padding, transposed=up)
        return nn.Sequential(layer, ts.nn.BatchNorm(b), ts.nn.ReLU(True))

    def residual(self, a: int, b: int, key: str) -> nn.Module:
        """A residual block."""
        return ts.backbones.SparseResBlock(a, b, 3)

    def cat(self, a: Any, b: Any) -> Any:
        """Features side by side."""
        return ts.cat([a, b])

    def features(self, x: Any) -> Tensor:
        """Of a tensor."""
        return x.feats


class Theirs:
    """The same layers of SpConv or what has its interface."""

    def __init__(self, module: str) -> None:
        self.sp: Any = importlib.import_module(module)

    def tensor(self, feats: Tensor, coords: Tensor, sizes: tuple[int, ...]) -> Any:
        """A sparse tensor."""
        return self.sp.SparseConvTensor(feats, coords, list(sizes[1:]), sizes[0])

    def conv(
        self, a: int, b: int, size: Any, stride: Any, key: str, *, up: bool = False, padding: Any = 0
    ) -> nn.Module:
        """Convolution, batch norm, ReLU."""
        sp = self.sp
        if up:
            layer = sp.SparseInverseConv3d(a, b, size, indice_key=key, bias=False)
        elif stride == 1:
            layer = sp.SubMConv3d(a, b, size, indice_key=key, bias=False)
        else:
            layer = sp.SparseConv3d(a, b, size, stride=stride, padding=padding, indice_key=key, bias=False)
        return sp.SparseSequential(layer, nn.BatchNorm1d(b), nn.ReLU(True))

    def residual(self, a: int, b: int, key: str) -> nn.Module:
        """A residual block."""
        return _TheirResidual(self.sp, a, b, key)

    def cat(self, a: Any, b: Any) -> Any:
        """Features side by side."""
        return a.replace_feature(torch.cat([a.features, b.features], dim=1))

    def features(self, x: Any) -> Tensor:
        """Of a tensor."""
        return x.features


class _TheirResidual(nn.Module):
    def __init__(self, sp: Any, a: int, b: int, key: str) -> None:
        super().__init__()
        self.main = sp.SparseSequential(
            sp.SubMConv3d(a, b, 3, indice_key=key, bias=False), nn.BatchNorm1d(b), nn.ReLU(True),
            sp.SubMConv3d(b, b, 3, indice_key=key, bias=False), nn.BatchNorm1d(b),
        )  # fmt: skip
        self.shortcut = None if a == b else nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b))

    def forward(self, x: Any) -> Any:
        """The block of a tensor."""
        beside = x.features if self.shortcut is None else self.shortcut(x.features)
        y = self.main(x)
        return y.replace_feature(torch.relu(y.features + beside))


class UNet(nn.Module):
    """MinkUNet: four stages down, four up."""

    def __init__(self, of: Any, width: float) -> None:
        super().__init__()
        self.of = of
        stem, *down = (int(width * c) for c in (32, 32, 64, 128, 256))
        up = [int(width * c) for c in (256, 128, 96, 96)]
        self.stem = nn.ModuleList([of.conv(4, stem, 3, 1, "s0"), of.conv(stem, stem, 3, 1, "s0")])
        widths = [stem, *down]
        self.down = nn.ModuleList(
            nn.ModuleList(
                [of.conv(a, a, 2, 2, f"d{i}"), of.residual(a, b, f"s{i + 1}"), of.residual(b, b, f"s{i + 1}")]
            )
            for i, (a, b) in enumerate(zip(widths, down, strict=False))
        )
        self.up, below = nn.ModuleList(), down[-1]
        for i, c in enumerate(up):
            beside = widths[3 - i]
            self.up.append(nn.ModuleList([
                of.conv(below, c, 2, 2, f"d{3 - i}", up=True), of.residual(c + beside, c, f"s{3 - i}"),
                of.residual(c, c, f"s{3 - i}"),
            ]))  # fmt: skip
            below = c

    def forward(self, x: Any) -> Any:
        """The tensor at full resolution."""
        for layer in self.stem:
            x = layer(x)
        kept = []
        for stage in self.down:
            kept.append(x)
            for layer in stage:
                x = layer(x)
        for stage in self.up:
            up, *fuse = stage
            x = self.of.cat(up(x), kept.pop())
            for layer in fuse:
                x = layer(x)
        return x


class CenterPoint(nn.Module):
    """The encoder of CenterPoint: four stages of residual blocks and a last convolution along the height."""

    def __init__(self, of: Any, width: float) -> None:
        super().__init__()
        self.of = of
        widths = [int(width * c) for c in (16, 32, 64, 128)]
        layers, below = [of.conv(4, widths[0], 3, 1, "s0")], widths[0]
        for i, c in enumerate(widths):
            if i:
                layers.append(of.conv(below, c, 3, 2, f"d{i}", padding=1))
            layers += [of.residual(c, c, f"s{i}"), of.residual(c, c, f"s{i}")]
            below = c
        layers.append(of.conv(below, below, (1, 1, 3), (1, 1, 2), "last"))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Any) -> Any:
        """The tensor at an eighth of the resolution."""
        for layer in self.layers:
            x = layer(x)
        return x


NETWORKS: dict[str, Callable[[Any], nn.Module]] = {
    "MinkUNet 0.5x": lambda of: UNet(of, 0.5), "MinkUNet 1x": lambda of: UNet(of, 1.0),
    "CenterPoint": lambda of: CenterPoint(of, 1.0),
}  # fmt: skip


def voxels(name: str, batch: int, where: torch.device) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Features [N, 4], coordinates int32 [N, 4] in random order, and the range (batch, x, y, z)."""
    sweeps, size = SCANS[name]
    feats, coords = [], []
    for sample in range(batch):
        found = scan(sample, sweeps=sweeps, device=where)
        cell = (found.points / size).floor().int()
        cell, inverse = cell.unique(dim=0, return_inverse=True)
        values = torch.cat([found.points / 50, found.intensity[:, None]], dim=1)
        sums = torch.zeros(len(cell), 4, device=where).index_add(0, inverse, values)
        order = torch.randperm(len(cell), generator=torch.Generator().manual_seed(0)).to(where)
        feats.append((sums / inverse.bincount()[:, None])[order])
        coords.append(torch.nn.functional.pad(cell[order], (1, 0), value=sample))
    joined = torch.cat(coords)
    joined[:, 1:] -= joined[:, 1:].amin(dim=0)
    sizes = (batch, *((joined[:, 1:].amax(dim=0) // 16 + 1) * 16).tolist())
    return torch.cat(feats), joined.int().contiguous(), sizes


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Wall time of a call, the GPU's work included."""
    times = []
    for _ in range(WARM_UP + repeats):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    return median(times[WARM_UP:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def inference(
    of: Any, make: Callable[[Any], nn.Module], data: tuple[Any, ...], where: torch.device
) -> dict[str, float]:
    """Of one scan in fp16."""
    feats, coords, sizes = data
    torch.manual_seed(0)
    dtype = torch.half if where.type == "cuda" else torch.float32
    model = make(of).to(where, dtype).eval()
    feats = feats.to(dtype)
    run: Callable[[Any], Any] = model
    if isinstance(of, Ours):
        ts.fuse(model)
        run = ts.cuda_graph(model) if of.graphed else model
    with torch.no_grad():
        return seconds(lambda: run(of.tensor(feats, coords, sizes)))


def training(of: Any, make: Callable[[Any], nn.Module], data: tuple[Any, ...], where: torch.device) -> dict[str, float]:
    """One step on two scans with mixed precision."""
    feats, coords, sizes = data
    torch.manual_seed(0)
    model = make(of).to(where).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = ts.cuda_graph(model) if isinstance(of, Ours) and of.graphed else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(where.type, torch.half if where.type == "cuda" else torch.bfloat16):
            out = of.features(run(of.tensor(feats, coords, sizes)))
        out.float().square().mean().backward()
        optimizer.step()

    return seconds(step)


def layers_and_maps(libraries: dict[str, Any], where: torch.device) -> list[dict[str, Any]]:
    """Single layers with their map at hand, called or captured, and the time to build one."""
    _, coords, sizes = voxels("40K", 1, where)
    rows: list[dict[str, Any]] = []
    built: dict[str, dict[str, float]] = {}
    for channels in (32, 64, 128):
        x = torch.randn(len(coords), channels, device=where).half()
        times: dict[str, dict[str, float]] = {}
        captured: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            # The host is as fast as these layers, and disturbed at times: the best of several turns counts.
            for name, of in list(libraries.items()) * TURNS:
                layer = of.conv(channels, channels, 3, 1, "s0")[0].to(where).half()
                first = of.tensor(x, coords, sizes)
                known = layer(first)
                known = first if isinstance(of, Ours) else known.replace_feature(x)
                call = partial(layer, known)
                fresh = seconds(lambda of=of, x=x, layer=layer: layer(of.tensor(x, coords, sizes)))
                kept = seconds(call)
                _keep_best(built, name, {key: fresh[key] - kept[key] for key in fresh})
                _keep_best(times, name, measure(call, graphed=False))
                try:
                    _keep_best(captured, name, measure(call))
                except RuntimeError as error:
                    sys.stdout.write(f"{name} cannot be captured: {str(error)[:200]}\n")
        what, shape = f"submanifold layer, {channels} channels", f"{len(coords)} voxels, 3x3x3"
        rows += _against(what, shape, times, 1.0) + _against(f"{what}, captured", shape, captured, 1.0)
    return [*rows, *_against("kernel map", f"{len(coords)} voxels, 3x3x3", built, 3.0)]


def _keep_best(of: dict[str, dict[str, float]], name: str, found: dict[str, float]) -> None:
    if name not in of or found["p50"] < of[name]["p50"]:
        of[name] = found


def tuned(network: str, scan_name: str, where: torch.device) -> dict[str, Any]:
    """A network as a graph, before and after `ts.tune`."""
    feats, coords, sizes = voxels(scan_name, 1, where)
    torch.manual_seed(0)
    model = NETWORKS[network](Ours()).to(where).half().eval()
    ts.fuse(model)

    def data() -> Any:
        return ts.SparseTensor(feats.half(), coords, spatial_range=sizes)

    with torch.no_grad():
        before = ts.cuda_graph(model)
        default = seconds(lambda: before(data()))
        ts.tune(model, [data()] * 3, n_samples=3, graph=True, verbose=False)
        after = ts.cuda_graph(model)
        ours = seconds(lambda: after(data()))
    return row(
        f"{network}, inference, tuned", "default", f"{scan_name}, {len(coords)} voxels", ours, default, reach=1.0
    )


def _against(what: str, shape: str, times: dict[str, dict[str, float]], reach: float | None) -> list[dict[str, Any]]:
    ours = times.pop("ours")
    return [row(what, name, shape, ours, theirs, reach=reach if name == "spconv-triton" else None)
            for name, theirs in times.items()]  # fmt: skip


# Scans a call, and how it is timed.
KINDS: dict[str, tuple[int, Callable[..., dict[str, float]]]] = {"inference": (1, inference), "training": (2, training)}


def networks_against(kind: str, libraries: dict[str, Any], where: torch.device) -> None:
    """Whole networks, written after each of them: the one peer takes many minutes to tune itself."""
    batch, run = KINDS[kind]
    rows: list[dict[str, Any]] = []
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for name, of in libraries.items():
        for scan_name in SCANS:
            data = voxels(scan_name, batch, where)
            shape = f"{scan_name}, {len(data[1])} voxels"
            for network, make in NETWORKS.items():
                try:
                    found = run(of, make, data, where)
                except Exception as error:  # noqa: BLE001 - a peer that fails is said so
                    sys.stdout.write(f"{name}, {network}, {kind}: {type(error).__name__}: {str(error)[:200]}\n")
                    continue
                sys.stdout.write(f"{kind} {network} {shape} {name}: {found['p50'] * 1e3:.2f} ms\n")
                sys.stdout.flush()
                known = times.setdefault((scan_name, network), {})
                known[name] = found
                if name in PEERS:
                    rows.append(row(f"{network}, {kind}", name, shape, known["ours"], found, reach=REACH[kind, name]))
                    rows.append(row(f"{network}, {kind}, layer by layer", name, shape, known[EAGER], found))
                    write(f"torchsparse-{kind}", rows)


def main() -> None:
    """Measure the parts that the command line names, or all, and write a file of results for each."""
    parts = sys.argv[1:] or ["layers", *KINDS]
    if unknown := set(parts) - {"layers", *KINDS}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are layers, {', '.join(KINDS)}")
    where = device()
    libraries: dict[str, Any] = {"ours": Ours(), EAGER: Ours(graphed=False)}
    for name, module in PEERS.items():
        try:
            libraries[name] = Theirs(module)
        except ImportError as error:
            sys.stdout.write(f"{name} is left out: {error}\n")
    for part in parts:
        if part in KINDS:
            networks_against(part, libraries, where)
        elif where.type == "cuda":  # a CPU has no graphs to tune, and its kernels are references
            rows = [tuned(network, "40K", where) for network in ("MinkUNet 1x", "CenterPoint")]
            rows += layers_and_maps({name: of for name, of in libraries.items() if name != EAGER}, where)
            write("torchsparse-layers", rows)


if __name__ == "__main__":
    main()
