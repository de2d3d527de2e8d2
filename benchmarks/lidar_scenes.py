"""Streets of boxes as a spinning LiDAR sees them: points, intensities, and what each point belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUND, BUILDING, VEHICLE, PERSON, POLE = range(5)
CLASSES = ("ground", "building", "vehicle", "person", "pole")
# Half sizes of boxes in metres (least, largest for each dimension), how far from the street's middle they stand, and
# the least and most that one reflects: a car is black or white, so that intensity by itself tells little.
KINDS = {
    BUILDING: (((4, 4, 3), (10, 8, 8)), (14, 40), (0.2, 0.5)),
    VEHICLE: (((1.8, 0.8, 0.7), (2.6, 1.1, 1.1)), (2.5, 9), (0.1, 0.9)),
    PERSON: (((0.25, 0.2, 0.8), (0.4, 0.35, 0.95)), (4, 13), (0.1, 0.5)),
    POLE: (((0.08, 0.08, 2), (0.15, 0.15, 4)), (6, 12), (0.3, 0.9)),
}
GROUND_REFLECTS = 0.3
SENSOR_HEIGHT, FARTHEST = 1.8, 75.0


@dataclass(frozen=True)
class Scan:
    """One turn of the sensor.

    Attributes:
        points: float32 [N, 3] in metres, from the sensor.
        intensity: float32 [N] from 0 to 1.
        label: int64 [N], one of `CLASSES`.
    """

    points: Tensor
    intensity: Tensor
    label: Tensor


def scan(
    seed: int, *, boxes: int = 100, beams: int = 64, azimuths: int = 2048, sweeps: int = 1,
    device: torch.device | str = "cpu",
) -> Scan:  # fmt: skip
    """A street drawn from a seed; of several sweeps the sensor moves a metre each, and points are in its last frame."""
    generator = torch.Generator().manual_seed(seed)
    street = _boxes(boxes, generator)
    low, high, kind, reflects = (tensor.to(device) for tensor in (*street, _reflectances(street[2], seed)))
    scans = []
    for sweep in range(sweeps):
        origin = torch.tensor([float(sweep - sweeps + 1), 0, SENSOR_HEIGHT], device=device)
        noise = torch.randn(beams * azimuths, generator=generator).to(device) * 0.02
        scans.append(_cast(origin, _rays(beams, azimuths).to(device), low, high, kind, reflects, noise))
    parts = [torch.cat(part) for part in zip(*scans, strict=True)]
    return Scan(parts[0] - torch.tensor([0, 0, SENSOR_HEIGHT], device=device), *parts[1:])


def _rays(beams: int, azimuths: int) -> Tensor:
    """Unit vectors [beams * azimuths, 3]: from 2 degrees above the horizon to 25 below."""
    up = torch.deg2rad(torch.linspace(2, -24.8, beams))[:, None]
    around = torch.arange(azimuths) * (2 * math.pi / azimuths)
    parts = up.cos() * around.cos(), up.cos() * around.sin(), up.sin().expand(beams, azimuths)
    return torch.stack(parts, dim=-1).view(-1, 3)


def _boxes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Least and largest corners [count, 3] and kinds [count] of boxes that stand on the ground."""
    kinds = torch.tensor([*KINDS])[torch.randint(0, len(KINDS), (count,), generator=generator)]
    corners = []
    for kind in kinds.tolist():
        (least, largest), (near, far), _ = KINDS[kind]
        half = torch.tensor(least) + torch.rand(3, generator=generator) * (torch.tensor(largest) - torch.tensor(least))
        along, aside, side = (torch.rand(3, generator=generator)).tolist()
        distance = (near + aside * (far - near)) * (1 if side < 0.5 else -1)
        centre = torch.tensor([120 * along - 60, distance, float(half[2])])
        corners.append(torch.stack([centre - half, centre + half]))
    low, high = torch.stack(corners, dim=1)
    clear = ~((low[:, :2] < 2).all(dim=1) & (high[:, :2] > -2).all(dim=1))  # none on top of the sensor
    return low[clear], high[clear], kinds[clear]


def _reflectances(kinds: Tensor, seed: int) -> Tensor:
    """How much each box reflects, from 0 to 1."""
    least, most = torch.tensor([KINDS[kind][2] for kind in kinds.tolist()]).view(-1, 2).T
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # not the one that the street was drawn from
    return least + (most - least) * torch.rand(len(kinds), generator=generator)


def _cast(
    origin: Tensor, rays: Tensor, low: Tensor, high: Tensor, kind: Tensor, reflects: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    best = torch.where(rays[:, 2] < 0, -origin[2] / rays[:, 2], torch.inf)
    label = torch.full_like(best, GROUND, dtype=torch.int64)
    returned = torch.full_like(best, GROUND_REFLECTS)
    inverse = 1 / torch.where(rays.abs() < 1e-9, 1e-9, rays)
    for start, end, of, share in zip(low, high, kind, reflects, strict=True):
        ends = torch.stack([(start - origin) * inverse, (end - origin) * inverse])
        first, last = ends.amin(dim=0).amax(dim=1), ends.amax(dim=0).amin(dim=1)
        closer = (first <= last) & (first > 0) & (first < best)
        best, label = torch.where(closer, first, best), torch.where(closer, of, label)
        returned = torch.where(closer, share, returned)
    seen = best < FARTHEST
    intensity = (returned * (1 - best / (2 * FARTHEST)) + 2 * noise).clamp(0, 1)
    points = origin + rays * (best + noise)[:, None]
    return points[seen], intensity[seen], label[seen]
