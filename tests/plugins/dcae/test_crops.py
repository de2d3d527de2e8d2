"""Crops: of a number always the same, from all kinds of images."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pronghorn.dcae.crops import Crops
from pronghorn.dcae.sources import squares


def picture(width=50, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_a_crop_of_a_number_is_always_the_same_and_others_differ():
    images = [picture(seed=seed) for seed in range(3)]
    one, other = Crops(images, size=16, seed=1), Crops(images, size=16, seed=1)
    found = [one[number] for number in range(20)]
    assert all(torch.equal(found[number], other[number]) for number in reversed(range(20)))
    assert len({x.sum().item() for x in found}) == 20
    assert not torch.equal(one[3], Crops(images, size=16, seed=2)[3])
    assert all(x.shape == (3, 16, 16) and x.abs().max() <= 1 for x in found)


def test_without_zoom_crops_are_as_high_as_the_image():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None] * 6, (40, 40, 3))
    crop = Crops([Image.fromarray(ramp.copy())], size=40, zoom=1.0)[0]
    assert torch.equal(crop[0, :, 0], torch.from_numpy(ramp[:, 0, 0].copy()).float() / 127.5 - 1)


def test_files_tensors_and_datasets(tmp_path):
    images = [picture(seed=seed) for seed in range(2)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images]
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{number}.png") for number in range(2)]})
    table = table.cast_column("image", datasets.Image())
    wanted = Crops(images, size=24)[5]
    for source in (tmp_path, sorted(tmp_path.iterdir()), tensors, table):
        assert torch.equal(Crops(source, size=24)[5], wanted)
    assert torch.stack(squares(table, size=24)).shape == (2, 3, 24, 24)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "there are none"),
        ([picture(50, 12)], ValueError, "image 0: is 50 x 12, wanted at least 16"),
        ([torch.full((3, 20, 20), torch.nan)], ValueError, "from -1 to 1"),
        ([torch.zeros(20, 20)], ValueError, "image 0: got"),
        ([{"picture": picture()}], ValueError, 'one named "image"'),
        ([b"x"], TypeError, "got a bytes"),
    ],
)
def test_bad_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        Crops(images, size=16)[0]


@pytest.mark.fault(27)
def test_bad_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read"):
        Crops(tmp_path, size=16)[0]


@pytest.mark.parametrize(("size", "zoom"), [(0, 2.0), (8, 0.5), (8, float("nan"))])
def test_bad_settings_are_refused(size, zoom):
    with pytest.raises(ValueError, match="size, zoom"):
        Crops([picture()], size=size, zoom=zoom)
