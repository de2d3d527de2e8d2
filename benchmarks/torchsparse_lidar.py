"""Segmentation of LiDAR scans by sparse convolution: a small U-Net against an MLP that sees one voxel at a time.

Scans are cast in streets of boxes (`lidar_scenes`), so every point is labelled; both networks are trained on the same
ones and scored on streets that they have not seen. Two real scans, unlabelled, then go through the U-Net for its time
and the size of its maps. `make demo` runs it: six minutes on two busy cores. Where others use the cores too, set
OMP_WAIT_POLICY=passive: threads that wait for each other actively then take many times as long.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import measure, median, picture_folder, row, write
from lidar_scenes import CLASSES, Scan, scan
from torch import Tensor, nn
from tqdm import tqdm

import pronghorn.torchsparse as ts
from pronghorn.torchsparse.quantize import sparse_quantize

VOXEL = 0.25  # metres
SIZES = (416, 416, 48)  # voxels; halved four times, they leave no remainder
LOWEST = torch.tensor([-52.0, -52.0, -4.0])  # metres from the sensor; what is out of the grid is left out
FEATURES = 7
BEAMS, AZIMUTHS = 32, 512
HELD_OUT_SEED = 10_000
WANTED = 0.75  # mIoU on held-out scans
ARCHIVE = "small_gicp-1.0.1.tar.gz"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pronghorn" / "assets"
COLOURS = ("#b9b9b9", "#4c72b0", "#dd8452", "#c44e52", "#2f9e44")


@dataclass(frozen=True)
class Voxels:
    """A scan as networks see it.

    Attributes:
        coords: int32 [voxels, 4], the batch index first.
        feats: float32 [voxels, FEATURES], the mean of each voxel's points.
        label: int64 [voxels], what most of its points are.
        points: float32 [points, 3], those within the grid.
        voxel: int64 [points], where each is.
        point_label: int64 [points].
    """

    coords: Tensor
    feats: Tensor
    label: Tensor
    points: Tensor
    voxel: Tensor
    point_label: Tensor

    def tensor(self) -> ts.SparseTensor:
        """With a cache of its own, so that maps are found anew."""
        return ts.SparseTensor(self.feats, self.coords, spatial_range=(1, *SIZES))


class UNet(nn.Module):
    """Sparse convolutions, then a linear layer at each voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ts.backbones.SparseResUNet(16, [16, 32, 64, 64], [64, 32, 16, 16], in_channels=FEATURES)
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: ts.SparseTensor) -> Tensor:
        """Logits [voxels, classes]."""
        logits: Tensor = self.head(self.backbone(x)[-1].feats)
        return logits


class PerVoxel(nn.Module):
    """The same features, without a look at the neighbours."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [FEATURES, width, width, width]
        hidden = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(width, len(CLASSES)))

    def forward(self, x: ts.SparseTensor) -> Tensor:
        """Logits [voxels, classes]."""
        logits: Tensor = self.layers(x.feats)
        return logits


def main() -> None:
    """Train both, compare them, draw a scan, time the real pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=140, help="of training, one scan each")
    parser.add_argument("--scans", type=int, default=60, help="to train on")
    parser.add_argument("--held-out", type=int, default=10, help="scans to score on")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the harness would time a GPU
    scans = scenes(range(arguments.scans))
    held_out = [voxelize(each) for each in scenes(range(HELD_OUT_SEED, HELD_OUT_SEED + arguments.held_out))]
    confusions, times = {}, {}
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"U-Net": UNet(), "MLP": PerVoxel()}
    for name, model in models.items():
        _, times[name] = train(model, scans, arguments.steps, name)
        found = [confusion(predict(model, each), each.point_label) for each in held_out]
        confusions[name] = torch.stack(found).sum(dim=0)
        print(f"{name}: mIoU {iou(confusions[name]).nanmean():.3f}, {sum(times[name]):.0f} s of training")
    rows = score_rows(confusions["U-Net"], confusions["MLP"], f"{arguments.held_out} held-out scans")
    shape = f"{BEAMS} x {AZIMUTHS} rays, {arguments.steps} steps"
    rows.append(row("training step", "per-voxel MLP", shape, median(times["U-Net"]), median(times["MLP"])))
    draw(held_out[0], predict(models["U-Net"], held_out[0]), picture_folder())
    rows += [entry for name, real in real_scans().items() for entry in real_rows(name, models["U-Net"], real)]
    write("torchsparse_lidar", rows)
    reached = float(iou(confusions["U-Net"]).nanmean())
    if reached < WANTED:
        sys.exit(f"mIoU {reached:.3f}, wanted {WANTED}")


def scenes(seeds: Sequence[int]) -> list[Scan]:
    """A scan of each seed's street."""
    return [
        scan(seed, beams=BEAMS, azimuths=AZIMUTHS)
        for seed in tqdm(seeds, desc="casting rays", leave=False, mininterval=2)
    ]


def voxelize(given: Scan) -> Voxels:
    """Points to voxels, with the mean of features and the most frequent label."""
    place = (given.points - LOWEST) / VOXEL
    inside = ((place >= 0) & (place < torch.tensor(SIZES))).all(dim=1)
    place, points, label = place[inside], given.points[inside], given.label[inside]
    sites, voxel = sparse_quantize(place, return_inverse=True)
    counts = torch.bincount(voxel, minlength=len(sites))
    described = torch.cat(
        [place - place.floor() - 0.5, points[:, 2:] / 3, points.norm(dim=1, keepdim=True) / 50,
         given.intensity[inside, None], counts[voxel, None].log()], dim=1,
    )  # fmt: skip
    feats = ts.nn.functional.spvoxelize(described, voxel, counts)
    votes = torch.zeros(len(sites), len(CLASSES)).index_put_((voxel, label), torch.ones(()), accumulate=True)
    return Voxels(nn.functional.pad(sites, (1, 0)), feats, votes.argmax(dim=1), points, voxel, label)


def train(model: nn.Module, scans: Sequence[Scan], steps: int, name: str = "") -> tuple[list[float], list[float]]:
    """Train on one scan a step, mirrored and turned at random; the losses, and the seconds of each step."""
    generator = torch.Generator().manual_seed(0)
    weight = class_weights(scans)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    order = torch.cat([torch.randperm(len(scans), generator=generator) for _ in range(-(-steps // len(scans)))])
    model.train()
    losses, times = [], []
    for index in tqdm(order[:steps].tolist(), desc=name, leave=False, mininterval=2):
        start = time.perf_counter()
        seen = voxelize(turned(scans[index], generator))
        loss = nn.functional.cross_entropy(model(seen.tensor()), seen.label, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return losses, times


def class_weights(scans: Sequence[Scan]) -> Tensor:
    """One over the square root of how often a class is seen: poles are few."""
    counts = torch.bincount(torch.cat([each.label for each in scans]), minlength=len(CLASSES)).clamp(min=1)
    weight = counts.float().rsqrt()
    return weight / weight.mean()


def turned(given: Scan, generator: torch.Generator) -> Scan:
    """One of the eight ways in which a street can lie on the grid."""
    mirror_x, mirror_y, swap = torch.randint(0, 2, (3,), generator=generator).tolist()
    signs = torch.tensor([1 - 2 * mirror_x, 1 - 2 * mirror_y, 1])
    points = given.points * signs
    return replace(given, points=points[:, [1, 0, 2]] if swap else points)


@torch.no_grad()
def predict(model: nn.Module, given: Voxels) -> Tensor:
    """Class of each point: of the voxel that it is in."""
    model.eval()
    found: Tensor = model(given.tensor()).argmax(dim=1)[given.voxel]
    return found


def confusion(predicted: Tensor, label: Tensor) -> Tensor:
    """Points by their label and what was predicted, int64 [classes, classes]."""
    classes = len(CLASSES)
    return torch.bincount(label * classes + predicted, minlength=classes**2).view(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, of a confusion matrix; NaN where a class is neither there nor predicted.

    Source: Everingham et al., The Pascal Visual Object Classes Challenge (IJCV 2015), section 4.4.
    """
    right = counts.diag().double()
    return right / (counts.sum(dim=0) + counts.sum(dim=1) - right)


def score_rows(ours: Tensor, theirs: Tensor, shape: str) -> list[dict[str, Any]]:
    """The mean and each class."""
    scores = [torch.cat([found.nanmean()[None], found]).tolist() for found in (iou(ours), iou(theirs))]
    names = ["mIoU", *(f"IoU, {name}" for name in CLASSES)]
    note = "of points; the MLP has the same features and steps, and sees no neighbours"
    return [
        row(name, "per-voxel MLP", shape, median([a]), median([b]), unit="IoU", note=note, higher_is_better=True)
        for name, a, b in zip(names, *scores, strict=True)
    ]


def real_scans() -> dict[str, Voxels]:
    """The two scans of small-gicp's source archive, unlabelled; none where it cannot be had."""
    try:
        archive = fetched()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the real scans are left out, as small-gicp's source archive cannot be had: {error}")
        return {}
    found = {}
    with tarfile.open(archive) as content:
        for name in ("source", "target"):
            (member,) = (each for each in content.getmembers() if each.name.endswith(f"data/{name}.ply"))
            file = content.extractfile(member)
            if file is None:
                raise ValueError(f"{archive}: {member.name} is no file")
            found[name] = voxelize(read_ply(file.read()))
    return found


def fetched() -> Path:
    """The archive, downloaded on the first call; pip builds its metadata, which takes half a minute."""
    path = CACHE / ARCHIVE
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", temporary, "small-gicp==1.0.1"], check=True, timeout=300)
        (Path(temporary) / ARCHIVE).rename(path)
    return path


def read_ply(content: bytes) -> Scan:
    """Points of a binary PLY file with x, y, z and intensity as floats; those at the sensor saw nothing."""
    head, _, body = content.partition(b"end_header\n")
    lines = head.decode().splitlines()
    properties = [line.split()[1:] for line in lines if line.startswith("property")]
    if "format binary_little_endian 1.0" not in lines or [kind for kind, _ in properties] != ["float"] * 4:
        raise ValueError(f"content: got a PLY file with header {lines}, wanted four floats in little-endian binary")
    values = torch.from_numpy(np.frombuffer(body, "<f4").reshape(-1, 4).copy())
    values = values[values.isfinite().all(dim=1) & (values[:, :3].norm(dim=1) > 0.5)]
    return Scan(values[:, :3], values[:, 3] / 255, torch.zeros(len(values), dtype=torch.int64))


def real_rows(name: str, model: nn.Module, real: Voxels) -> list[dict[str, Any]]:
    """How long the network takes for a real scan, and what its maps hold."""
    with torch.no_grad():
        seen = real.tensor()
        model.eval()(seen)
        ours = measure(lambda: model(real.tensor()), warmup=1)
        theirs = measure(lambda: model(seen), warmup=1)
    maps = {key[0][0]: found for key, found in seen._caches.kmaps.items() if len(found.found) == 27}
    each = ", ".join(f"{sum(found.sizes)} pairs of {found.found.shape[1]} voxels" for _, found in sorted(maps.items()))
    pairs, dense = sum(maps[1].sizes) / len(real.coords), 27.0
    box = float((real.coords.amax(dim=0) - real.coords.amin(dim=0) + 1).prod())
    shape, what = f"{len(real.points)} points, {len(real.coords)} voxels", f"real scan, {name}"
    return [
        row(f"forward, {what}", "with its maps at hand", shape, ours, theirs, note="maps are found anew"),
        row(f"pairs of a 3x3x3 map, {what}", "dense grid", shape, median([pairs]), median([dense]),
            unit="pairs a voxel", note=f"at strides {', '.join(map(str, sorted(maps)))}: {each}"),
        row(f"voxels, {what}", "the box around them", shape, median([float(len(real.coords))]), median([box]),
            unit="voxels"),
    ]  # fmt: skip


def draw(given: Voxels, predicted: Tensor, folder: Path) -> None:
    """A scan from above: labels, and what was predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    figure, panels = plt.subplots(1, 2, figsize=(10, 5.4), layout="constrained", sharey=True)
    score = iou(confusion(predicted, given.point_label)).nanmean()
    titles = ("labels", f"predictions, mIoU of this scan {score:.2f}")
    order = given.points[:, 2].argsort()  # what is high lies on top
    for panel, title, shown in zip(panels, titles, (given.point_label, predicted), strict=True):
        x, y = given.points[order, :2].T
        drawn = panel.scatter(x, y, c=shown[order], s=0.8, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=4.5, lw=0)
        panel.set(title=title, xlabel="metres", xlim=(-45, 45), ylim=(-45, 45), aspect="equal")
    bar = figure.colorbar(drawn, ax=panels, ticks=range(len(CLASSES)), location="bottom", shrink=0.5, aspect=40)
    bar.ax.set_xticklabels(CLASSES)
    figure.suptitle("A street that the network has not seen, from above")
    figure.savefig(folder / "torchsparse_lidar.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
