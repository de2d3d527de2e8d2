"""What is found in folders, and that nothing that is made of images replaces one."""

import shutil

import pytest
from PIL import Image
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_cli import folder, run  # noqa: F401 - a fixture
from tests.plugins.dcae.test_latents import photos  # noqa: F401 - a fixture

from pronghorn.dcae.compare import compare
from pronghorn.dcae.images import find_images


@pytest.fixture
def flat(photos, tmp_path):  # noqa: F811
    """Photographs in one folder, two of them .png."""
    (tmp_path / "flat").mkdir()
    for path in find_images(photos):
        shutil.copy(path, tmp_path / "flat" / path.name)
    return tmp_path / "flat"


def contents(where):
    return {path.name: path.read_bytes() for path in where.iterdir()}


def test_pictures_never_replace_images(folder, flat, tmp_path):  # noqa: F811
    before = contents(flat)
    linked = tmp_path / "linked"
    linked.symlink_to(flat)
    for output in (flat, linked):
        with pytest.raises(ValueError, match=r"output: got .*, where one\.png would replace an image, and 1 more"):
            run("reconstruct", folder, flat, output, "--device", "cpu")
        with pytest.raises(ValueError, match=r"output: got .* wanted another folder"):
            compare({"ours": small()}, flat, output, size=16, verbose=False)
    inside = flat / "inside"
    run("reconstruct", folder, flat, inside, "--device", "cpu")
    made = contents(inside)
    with pytest.raises(ValueError, match="would replace an image"):  # what was made is found as an image now
        run("reconstruct", folder, flat, inside, "--device", "cpu")
    assert contents(inside) == made
    shutil.rmtree(inside)
    assert contents(flat) == before


@pytest.mark.parametrize("twin", ["a/one.jpg", "a-one.png"])
def test_two_images_never_share_a_picture(folder, photos, tmp_path, twin):  # noqa: F811
    Image.new("RGB", (16, 16)).save(photos / twin)
    with pytest.raises(ValueError, match="1 have the name of another one"):
        run("reconstruct", folder, photos, tmp_path / "out", "--device", "cpu")
    assert not (tmp_path / "out").exists()


def test_linked_folders_are_looked_into_once(flat, tmp_path):
    data = tmp_path / "data"
    (data / "plain").mkdir(parents=True)
    shutil.copy(flat / "one.png", data / "plain" / "one.png")
    (data / "linked").symlink_to(flat)
    (data / "plain" / "round").symlink_to(data)
    (data / "folder.png").mkdir()
    names = [str(path.relative_to(data)) for path in find_images(data)]
    assert names == ["linked/one.png", "linked/three.png", "linked/two.jpg", "plain/one.png"]


def test_what_is_no_folder_of_images_is_said(flat, tmp_path):
    with pytest.raises(ValueError, match=r"images: got .*nothing, which is not there; wanted a folder"):
        find_images(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"images: got .*one\.png, which is a file; wanted a folder"):
        find_images(flat / "one.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        find_images(tmp_path / "empty")
