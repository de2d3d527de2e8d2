"""Images and points at the edge of what there is: refused by name, or equal to a reference."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.kernels.harness import DEVICE

from pronghorn import torchsparse as ts
from pronghorn.dcae.images import load_image, open_image, to_tensor
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.quantize import sparse_quantize

INT32 = torch.iinfo(torch.int32)
PLACE = st.floats(-100, 100) | st.floats(-1e12, 1e12) | st.sampled_from([float("nan"), float("inf")])
SEED = np.random.default_rng(0)


def noise(*shape):
    return SEED.integers(0, 256, shape, dtype=np.uint8)


def png(width, height, rows=b""):
    """A PNG that says that it is so large, with these rows of pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "png"), ("L", "png"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"),
                         ("RGBA", "webp"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg")],
)  # fmt: skip
def test_every_mode_is_what_pillow_makes_of_it(tmp_path, mode, suffix):
    path = tmp_path / f"one.{suffix}"
    Image.fromarray(noise(6, 5, 3)).convert(mode).save(path, lossless=True)
    with Image.open(path) as opened:
        wanted = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(load_image(path), wanted)


@pytest.mark.fault(27)
def test_of_what_moves_the_first_picture_is_taken(tmp_path):
    pictures = [Image.fromarray(noise(6, 5, 3)) for _ in range(3)]
    for suffix in ("png", "webp", "tiff"):
        path = tmp_path / f"moving.{suffix}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True)
        with Image.open(path) as opened:
            assert opened.n_frames == 3  # it does move
        assert torch.equal(load_image(path), to_tensor(pictures[0]))


@pytest.mark.fault(27)
def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "one.png")
    wanted = torch.tensor([255.0, 0, 51]) / 127.5 - 1
    assert torch.equal(load_image(tmp_path / "one.png"), wanted[:, None, None])
    assert torch.equal(load_image(tmp_path / "one.png", size=4), wanted[:, None, None].expand(3, 4, 4))
    with pytest.raises(ValueError, match=r"one\.png: is 1 x 1, wanted at least 2"):
        load_image(tmp_path / "one.png", multiple=2)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a", png(0, 0), png(0, 4), png(4, 4), png(4, 4, b"\0" * 20), png(10**4, 10**4), png(10**5, 10**5),
     png(2**31 - 1, 2**31 - 1)],
    ids=["empty", "head alone", "0 x 0", "0 x 4", "no pixels", "some pixels", "1e8 pixels", "1e10 pixels", "2e9 wide"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_no_image_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(png(2, 1, b"\0" + b"\1" * 6))
    assert open_image(path).size == (2, 1)  # the maker of these files makes a right one
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png: "):
        load_image(path)


@pytest.mark.fault(27)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"one.{suffix}"
    Image.fromarray(noise(40, 50, 3)).save(path)
    whole = path.read_bytes()
    assert load_image(path).shape == (3, 40, 50)
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"one\.{suffix}: cannot be read"):
            load_image(path)


@pytest.mark.fault(27)
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused(tmp_path, mode):
    """Pillow would make 255 of every number beyond it."""
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((4, 4), 300, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: .*8 bits"):
        load_image(tmp_path / "deep.tif")


@pytest.mark.fault(27)
def test_an_image_without_pixels():
    with pytest.raises(ValueError, match="is 0 x 3, wanted at least one pixel"):
        to_tensor(Image.new("RGB", (0, 3)), size=4)


def layer():
    torch.manual_seed(0)
    return ts.nn.Conv3d(2, 3, 3)


def sparse(coords, batch=None):
    coords = torch.tensor(coords, dtype=torch.int32).reshape(-1, 4)
    generator = torch.Generator().manual_seed(len(coords))
    given = {} if batch is None else {"spatial_range": (batch, 8, 8, 8)}
    return ts.SparseTensor(torch.randn(len(coords), 2, generator=generator), coords, **given)


@pytest.mark.fault(27)
def test_one_voxel_meets_its_middle_alone():
    x, conv = sparse([[0, 3, 3, 3]]), layer()
    torch.testing.assert_close(conv(x).feats, x.feats @ conv.kernel[13])


@pytest.mark.fault(27)
def test_a_batch_with_an_empty_sample_is_the_other_samples():
    conv, sites = layer(), [[0, 1, 1, 1], [0, 1, 1, 2], [2, 5, 5, 5]]
    together = sparse(sites, batch=3)
    found = conv(together)
    assert torch.equal(found.coords, together.coords)
    for sample in (0, 2):
        rows = together.coords[:, 0] == sample
        alone = ts.SparseTensor(together.feats[rows], together.coords[rows])
        torch.testing.assert_close(found.feats[rows], conv(alone).feats)
    assert not found.dense()[1].any()


@pytest.mark.fault(27)
@given(places=st.lists(st.tuples(PLACE, PLACE, PLACE), max_size=6), size=st.sampled_from([0.05, 1.0, 3.0]))
def test_points_become_voxels_or_are_refused(places, size):
    """Against NumPy; NaN, Inf and what leaves int32 are refused, and none of them is wrapped around."""
    points = np.array(places, np.float64).reshape(-1, 3)
    scaled = np.floor(points / size)
    fits = bool(np.isfinite(scaled).all() and (np.abs(scaled + 0.5) < INT32.max).all())
    if not fits:
        with pytest.raises(ValueError, match=r"coords: got .* in row|voxel_size"):
            sparse_quantize(points, size)
        return
    found, inverse = sparse_quantize(points, size, return_inverse=True)
    assert np.array_equal(found, np.unique(scaled, axis=0).astype(np.int32).reshape(-1, 3))
    assert np.array_equal(found[inverse], scaled.astype(np.int32))


@pytest.mark.slow
@pytest.mark.fault(27)
def test_a_million_points(figure, monkeypatch):
    """Voxels as NumPy has them, and a convolution of some of them as a sum over their neighbours."""
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(1_000_000, 3, generator=draw, dtype=torch.float64) * 40
    voxels, inverse = sparse_quantize(points.to(DEVICE), 0.2, return_inverse=True)
    wanted = np.unique(np.floor(points.numpy() / 0.2), axis=0).astype(np.int32)
    assert np.array_equal(voxels.cpu().numpy(), wanted)
    assert np.array_equal(wanted[inverse.cpu()], np.floor(points.numpy() / 0.2).astype(np.int32))

    monkeypatch.setattr(settings, "allow_tf32", False)
    coords = torch.nn.functional.pad(voxels - voxels.amin(dim=0), (1, 0))
    feats = torch.randn(len(coords), 2, generator=draw).to(DEVICE)
    conv = layer().to(DEVICE)
    with torch.no_grad():
        found = conv(ts.SparseTensor(feats, coords))
    assert torch.equal(found.coords, coords)
    place = {tuple(voxel): row for row, voxel in enumerate(wanted.tolist())}
    kernel, feats = conv.kernel.detach().double().cpu(), feats.double().cpu()
    for row in range(0, len(wanted), len(wanted) // 200):
        total = torch.zeros(3, dtype=torch.float64)
        for number, offset in enumerate(np.ndindex(3, 3, 3)):
            neighbour = place.get(tuple((wanted[row] + offset[::-1] - 1).tolist()))  # the first axis is the fastest
            if neighbour is not None:
                total += feats[neighbour] @ kernel[number]
        torch.testing.assert_close(found.feats[row].double().cpu(), total, rtol=1e-4, atol=1e-4)
    figure("voxels of a million points", len(wanted))
