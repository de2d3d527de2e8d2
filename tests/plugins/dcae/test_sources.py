"""Images of all kinds: which are refused, all at once and before any work, and which way is up."""

import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.dcae.test_crops import picture
from tests.plugins.dcae.test_training import config, model

from pronghorn.dcae import AutoencoderTrainer
from pronghorn.dcae.crops import Crops
from pronghorn.dcae.images import _warn_once, load_image, open_image
from pronghorn.dcae.sources import Sources, squares

DEEP = Image.fromarray(np.full((20, 20), 4000, np.uint16))


@pytest.fixture
def mixed(tmp_path):
    """Two good images and three bad ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(2):
        picture(40, 36, number).save(folder / f"{number}.png")
    picture(50, 12).save(folder / "small.png")
    DEEP.save(folder / "deep.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def table(*paths):
    found = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "label": [0] * len(paths)})
    return found.cast_column("image", datasets.Image())


@pytest.mark.fault(27)
def test_all_bad_images_are_named_before_any_work(mixed, tmp_path):
    wanted = (r"images: 3 of 5 cannot be used:\n.*broken\.jpg: cannot be read as an image.*\n"
              r".*deep\.png: .*8 bits.*\n.*small\.png: is 50 x 12, wanted at least 16")  # fmt: skip
    with pytest.raises(ValueError, match=wanted):
        AutoencoderTrainer(model(), config(), mixed, output=tmp_path / "out")
    with pytest.raises(ValueError, match=wanted):
        Crops(sorted(mixed.iterdir()), size=16)
    rows = table(*sorted(mixed.iterdir()))
    with pytest.raises(ValueError, match=r"3 of 5 .*\nimage 2: cannot .*\nimage 3: .*8 bits.*\nimage 4: is 50 x 12"):
        Crops(rows, size=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(27)
def test_images_that_are_held_out_are_never_made_larger(mixed, tmp_path):
    wanted = r"held_out: 3 of 5 cannot be used:\n.*broken\.jpg.*\n.*deep\.png.*\n.*small\.png: is 50 x 12, wanted"
    with pytest.raises(ValueError, match=wanted):
        AutoencoderTrainer(model(), config(), [picture()], output=tmp_path / "out", held_out=mixed)
    with pytest.raises(ValueError, match=r"held_out: 1 of 2 cannot be used:\nimage 1: is 15 x 40, wanted at least 16"):
        AutoencoderTrainer(
            model(), config(), [picture()], output=tmp_path / "out", held_out=[picture(16, 16), picture(15, 40)]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(27)
def test_heads_are_enough(tmp_path):
    """No image is decoded to know that it is large enough; one whose pixels are broken is named when it is read."""
    picture(40, 36).save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:1000])
    rows = table(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: cannot be read"):
        Crops(tmp_path, size=16)[0]
    with pytest.raises(ValueError, match="image 0: "):
        Crops(rows, size=16)[0]


@pytest.mark.fault(27)
def test_sixteen_bits_are_refused_wherever_they_are(tmp_path):
    DEEP.save(tmp_path / "deep.png")
    for images in ([DEEP], tmp_path, table(tmp_path / "deep.png")):
        with pytest.raises(ValueError, match="wanted 8 bits for each channel"):
            Crops(images, size=16)
        with pytest.raises(ValueError, match="wanted 8 bits for each channel"):
            squares(images, size=16)


@pytest.mark.fault(27)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
    image, exif = picture(20, 16), Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / "0.webp", exif=exif, lossless=True)
    turns = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
             7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
    turn = turns[orientation]
    upright = image.transpose(Image.Transpose[turn]) if turn else image
    wanted = torch.from_numpy(np.array(upright)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(load_image(tmp_path / "0.webp"), wanted)
    with Image.open(tmp_path / "0.webp") as opened:
        for images in ([opened], tmp_path, table(tmp_path / "0.webp")):
            assert np.array_equal(np.asarray(Sources(images)[0]), np.asarray(upright))


@pytest.mark.fault(27)
def test_an_orientation_that_cannot_be_read_is_said_and_ends_nothing(tmp_path, caplog):
    picture(20, 16).save(tmp_path / "0.webp", exif=b"Exif\0\0XX nonsense", lossless=True)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        assert open_image(tmp_path / "0.webp").size == (20, 16)
    assert "orientation of an image cannot be read" in caplog.text


@pytest.mark.fault(27)
def test_images_that_are_enlarged_are_told_of_once(tmp_path, caplog):
    for number, size in enumerate([(40, 30), (14, 9), (8, 30)]):
        picture(*size).save(tmp_path / f"{number}.png")
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        assert load_image(tmp_path / "0.png", size=16).shape == (3, 16, 16)
        assert not caplog.text
        for number in (1, 2):
            assert load_image(tmp_path / f"{number}.png", size=16).shape == (3, 16, 16)
    assert caplog.text.count("images whose shorter edge is below 16 pixels are enlarged") == 1


@pytest.mark.fault(27)
def test_images_that_have_no_numbers_are_refused(mixed):
    rows = table(mixed / "0.png")
    for images, message in (
        (rows.to_iterable_dataset(), "images: got a IterableDataset, wanted images that each can be had by its number"),
        (datasets.DatasetDict({"train": rows, "test": rows}), "got a DatasetDict of train, test; wanted one of these"),
        ((image for image in [picture()]), "got a generator, wanted"),
    ):
        for take in (Crops, squares):
            with pytest.raises(TypeError, match=message):
                take(images, size=16)
    with pytest.raises(ValueError, match=r"images: got .*0\.png, which is a file; wanted a folder"):
        Crops(str(mixed / "0.png"), size=16)
