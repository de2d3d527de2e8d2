"""Pieces of benchmarks/torchsparse_lidar.py: its scenes, training and scores."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def room(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def lidar(room):
    return room("torchsparse_lidar")


def test_a_ray_has_the_label_of_the_first_box_that_it_hits(room):
    scenes = room("lidar_scenes")
    rays = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, -1], [0, 0, 1]]), dim=1)
    low = torch.tensor([[9.0, -1, 0], [4, -1, 0], [-1, 6, 0]])
    high = torch.tensor([[11.0, 1, 3], [5, 1, 3], [1, 7, 3]])
    kinds = torch.tensor([scenes.BUILDING, scenes.PERSON, scenes.POLE])
    origin, reflects = torch.tensor([0, 0, 1.8]), torch.tensor([0.2, 0.4, 0.8])
    points, intensity, label = scenes._cast(origin, rays, low, high, kinds, reflects, torch.zeros(4))
    wanted = torch.tensor([[4, 0, 1.8], [0, 6, 1.8], [-1.8, 0, 0]])  # the fourth ray goes to the sky
    torch.testing.assert_close(points, wanted, atol=1e-5, rtol=0)
    assert label.tolist() == [scenes.PERSON, scenes.POLE, scenes.GROUND]
    farther = 1 - torch.tensor([4, 6, 1.8 * 2**0.5]) / (2 * scenes.FARTHEST)
    torch.testing.assert_close(intensity, torch.tensor([0.4, 0.8, scenes.GROUND_REFLECTS]) * farther)


@pytest.mark.parametrize("seed", [0, 7])
def test_points_of_a_scan_lie_where_their_labels_are(room, seed):
    scenes = room("lidar_scenes")
    found = scenes.scan(seed, beams=16, azimuths=128)
    low, high, kinds = scenes._boxes(100, torch.Generator().manual_seed(seed))
    points = found.points[:, None] + torch.tensor([0, 0, scenes.SENSOR_HEIGHT])
    reached = ((points > low - 0.15) & (points < high + 0.15)).all(dim=2) & (kinds == found.label[:, None])
    ground = found.label == scenes.GROUND
    assert reached.any(dim=1)[~ground].all()
    assert (found.points[ground, 2] + scenes.SENSOR_HEIGHT).abs().max() < 0.15
    assert (~ground).sum() > 100


def test_voxels_hold_their_points(room, lidar):
    found = lidar.voxelize(room("lidar_scenes").scan(1, beams=16, azimuths=128))
    sites = ((found.points - lidar.LOWEST) / lidar.VOXEL).floor().int()
    assert torch.equal(sites, found.coords[found.voxel, 1:])
    assert found.feats.shape == (len(found.coords), lidar.FEATURES)
    assert (found.label[found.voxel] == found.point_label).float().mean() > 0.95
    found.tensor().check()


def test_training_lowers_the_loss_of_both_networks(room, lidar):
    scans = [room("lidar_scenes").scan(2, beams=12, azimuths=96)]
    for network in (lidar.UNet, lidar.PerVoxel):
        torch.manual_seed(0)
        losses, times = lidar.train(network(), scans, 8)
        assert min(losses[-2:]) < 0.8 * losses[0]
        assert len(times) == 8


def test_scores_of_what_is_known(lidar):
    label = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    assert lidar.iou(lidar.confusion(label, label)).tolist() == [1] * 5
    predicted = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    torch.testing.assert_close(
        lidar.iou(lidar.confusion(predicted, label)), torch.tensor([1 / 2, 1 / 2, 1, 1 / 3, 0]).double()
    )
    few = torch.tensor([0, 1])
    assert lidar.iou(lidar.confusion(few, few)).nanmean() == 1


def test_ply_is_read_without_points_at_the_sensor(lidar):
    properties = "".join(f"property float {name}\n" for name in ("x", "y", "z", "scalar_intensity"))
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex 2\n{properties}end_header\n"
    body = np.array([[0, 0, 0, 9], [3, 4, 1, 51]], "<f4").tobytes()
    found = lidar.read_ply(head.encode() + body)
    assert found.points.tolist() == [[3, 4, 1]]
    assert found.intensity.tolist() == pytest.approx([0.2])
    with pytest.raises(ValueError, match="little-endian"):
        lidar.read_ply(head.replace("little", "big").encode() + body)
