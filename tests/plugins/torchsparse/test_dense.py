"""Every layer against dense convolution in float64, and what convolution must not depend on."""

import itertools

import pytest
import torch
from torch.nn import functional

from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.kernel_maps import kernel_indices
from pronghorn.torchsparse.nn.functional import conv3d
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
LAYERS = {1: spnn.Conv1d, 2: spnn.Conv2d, 3: spnn.Conv3d, 4: spnn.Conv4d}
SHAPES = {1: (9,), 2: (7, 6), 3: (6, 5, 7), 4: (4, 3, 5, 4)}
FAR = 1e-12


def grid(*sizes, share=1.0, channels=3, seed=0, ranged=True):
    """A tensor on a share of all sites, in random order."""
    generator = torch.Generator().manual_seed(seed)
    sites = (torch.rand(*sizes, generator=generator) < share).nonzero()
    sites = sites[torch.randperm(len(sites), generator=generator)].int()
    feats = torch.randn(len(sites), channels, dtype=torch.float64, generator=generator)
    return SparseTensor(feats.to(DEVICE), sites.to(DEVICE), spatial_range=sizes if ranged else None)


def kernel(layer):
    """A layer's weight as dense convolution wants it, [output channels, input channels, *kernel size]."""
    weight = layer.kernel.new_zeros(*layer.kernel_size, layer.in_channels, layer.out_channels)
    weight[tuple(kernel_indices(layer.kernel_size).T)] = layer.kernel.view(-1, layer.in_channels, layer.out_channels)
    return weight.movedim((-1, -2), (0, 1))


def made(ndim, *arguments, **options):
    torch.manual_seed(1)
    return LAYERS[ndim](*arguments, **options).double().to(DEVICE)


def channels_first(x):
    return x.dense().movedim(-1, 1)


def at(dense, coords):
    return dense.movedim(1, -1)[tuple(coords.long().T)]


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= FAR * theirs.abs().max()


def test_the_order_of_weights_is_that_of_the_spec():
    weight = kernel(made(3, 3, 2, (3, 1, 5)))
    layer = made(3, 3, 2, (3, 1, 5))
    for x, z in itertools.product(range(3), range(5)):
        assert torch.equal(layer.kernel[x + 3 * z], weight[:, :, x, 0, z].T)
    layer = made(3, 3, 2, (3, 2, 2))
    for x, y, z in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(layer.kernel[(x * 2 + y) * 2 + z], kernel(layer)[:, :, x, y, z].T)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("ndim", "size"), [(1, 3), (2, 3), (2, (1, 5)), (3, 3), (3, 5), (3, (1, 3, 1)), (3, 1)])
def test_submanifold_layers_are_dense_ones_at_the_sites(ndim, size, dilation):
    x = grid(2, *SHAPES[ndim], share=0.4)
    layer = made(ndim, 3, 4, size, dilation=dilation, bias=True)
    y = layer(x)
    padding = [(edge - 1) // 2 * dilation for edge in layer.kernel_size]
    wanted = DENSE[ndim](channels_first(x), kernel(layer), layer.bias, padding=padding, dilation=dilation)
    assert y.coords is x.coords
    assert_equal(y.feats, at(wanted, y.coords))


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize(
    ("ndim", "size", "stride", "padding", "dilation"),
    [(1, 3, 2, 1, 1), (1, 4, 3, 2, 1), (2, 3, 2, 1, 1), (2, 2, 2, 0, 1), (3, 3, 2, 1, 1), (3, 3, 2, 0, 1),
     (3, 2, 2, 0, 1), (3, (3, 1, 1), (2, 1, 1), 0, 1), (3, 3, (2, 1, 2), 1, 1), (3, 3, 2, (0, 1, 1), 1),
     (3, 1, 2, 0, 1), (3, 5, 3, 2, 1), (3, 3, 2, 2, 2), (3, 2, 3, 1, 2)],
)  # fmt: skip
def test_strided_layers_are_dense_ones(ndim, size, stride, padding, dilation, share):
    x = grid(2, *SHAPES[ndim], share=share)
    layer = made(ndim, 3, 4, size, stride, padding, dilation)
    y = layer(x)
    wanted = DENSE[ndim](channels_first(x), kernel(layer), None, stride, padding, dilation)
    assert y.spatial_range == (2, *wanted.shape[2:])
    assert_equal(y.dense().movedim(-1, 1), wanted)  # sites that no input reaches are zeros in both
    order = y.coords.tolist()
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("ndim", "size", "stride", "padding"),
    [(1, 3, 2, 1), (2, 2, 2, 0), (3, 3, 2, 1), (3, 2, 2, 0), (3, (3, 1, 1), (2, 1, 1), 0), (3, 5, 3, 2)],
)
def test_transposed_layers_are_dense_ones_on_the_way_back(ndim, size, stride, padding):
    x = grid(2, *SHAPES[ndim])
    down = made(ndim, 3, 4, size, stride, padding)
    up = made(ndim, 4, 2, size, stride, padding, transposed=True, bias=True)
    y = down(x)
    z = up(y)
    assert z.coords is x.coords
    assert (z.stride, z.spatial_range) == (x.stride, x.spatial_range)
    weight = kernel(up).transpose(0, 1)
    steps, pads = up.stride, up.padding
    least = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(y.spatial_range[1:], steps, pads, up.kernel_size,
                                                           strict=True)]  # fmt: skip
    more = [max(0, n - m) for n, m in zip(x.spatial_range[1:], least, strict=True)]
    wanted = TRANSPOSED[ndim](channels_first(y), weight, up.bias, stride, padding, more)
    assert_equal(z.feats, at(wanted, z.coords))


def test_four_dimensions_are_as_a_loop_has_them():
    x = grid(2, *SHAPES[4], share=0.4)
    rows = {tuple(site): row for row, site in enumerate(x.coords.tolist())}
    for size, stride, padding in ((3, 1, 0), (2, 2, 0), (3, 2, 1)):
        layer = made(4, 3, 2, size, stride, padding)
        y = layer(x)
        first = padding if stride > 1 else (size - 1) // 2
        weight, wanted = kernel(layer), torch.zeros_like(y.feats)
        for row, (batch, *site) in enumerate(y.coords.tolist()):
            for index in itertools.product(range(size), repeat=4):
                at = tuple(q * stride - first + i for q, i in zip(site, index, strict=True))
                found = rows.get((batch, *at))
                if found is not None:
                    wanted[row] += weight[(slice(None), slice(None), *index)] @ x.feats[found]
        assert_equal(y.feats, wanted)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_are_those_of_dense_layers(ndim):
    x = grid(2, *SHAPES[ndim], share=0.5)
    x.feats.requires_grad_()
    layer = made(ndim, 3, 4, 3, 2, 1)
    loss = layer(x).feats.sin().sum()
    dense = DENSE[ndim](channels_first(x), kernel(layer), None, 2, 1).sin().sum()
    for ours, theirs in zip(*(torch.autograd.grad(of, (x.feats, layer.kernel)) for of in (loss, dense)), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 3), (4, 2)])
def test_generative_layers_reach_all_that_they_can(size, stride):
    x = grid(2, 4, 3, 5, share=0.3)
    layer = made(3, 3, 4, size, stride, generative=True)
    y = layer(SparseTensor(x.feats, x.coords, stride, x.spatial_range))
    sizes = [edge * stride for edge in (4, 3, 5)]
    assert y.spatial_range == (2, *sizes)
    assert y.stride == (1, 1, 1)
    # Offsets begin at -(size - 1) // 2: that many places are cut off in front, and the range ends it behind.
    cut = (size - 1) // 2
    full = functional.conv_transpose3d(channels_first(x), kernel(layer).transpose(0, 1), None, stride)
    full = functional.pad(full, [0, max(0, stride + cut - size)] * 3)
    wanted = full[(..., *(slice(cut, cut + edge) for edge in sizes))]
    assert_equal(channels_first(y), wanted)
    ones = x.replace(torch.ones_like(x.feats[:, :1]))
    reach = functional.conv_transpose3d(channels_first(ones), torch.ones(1, 1, *[size] * 3).to(x.feats), None, stride)
    reach = functional.pad(reach, [0, max(0, stride + cut - size)] * 3)
    assert len(y.coords) == int((reach[(..., *(slice(cut, cut + edge) for edge in sizes))] > 0).sum())


STRIDED = [(3, 1, 0), (3, 2, 1), (2, 2, 0), (5, 1, 0)]


@pytest.mark.parametrize(("size", "stride", "padding"), STRIDED)
def test_where_the_sites_are_does_not_matter(size, stride, padding, monkeypatch):
    monkeypatch.setattr(settings, "allow_negative_coordinates", True)
    layer = made(3, 3, 4, size, stride, padding)
    x = grid(2, 6, 5, 7, share=0.4, ranged=False)
    steps = torch.tensor([0, 2, -3, 5], dtype=torch.int32, device=DEVICE) * 10
    moved = SparseTensor(x.feats, x.coords + steps * stride)
    y, z = layer(x), layer(moved)
    # Far from 0 there is no edge of a grid to cut sites off.
    far = layer(SparseTensor(x.feats, x.coords + (steps + steps.abs()) * stride))
    for other, shift in ((z, steps), (far, steps + steps.abs())):
        rows = {tuple(site): row for row, site in enumerate((other.coords - shift).tolist())}
        order = [rows[tuple(site)] for site in y.coords.tolist() if tuple(site) in rows]
        kept = [row for row, site in enumerate(y.coords.tolist()) if tuple(site) in rows]
        assert len(kept) >= 0.7 * len(y.coords)
        assert_equal(other.feats[order], y.feats[kept])


@pytest.mark.parametrize(("size", "stride", "padding"), STRIDED)
def test_the_order_of_rows_does_not_matter(size, stride, padding):
    layer = made(3, 3, 4, size, stride, padding)
    x = grid(2, 6, 5, 7, share=0.4)
    order = torch.randperm(len(x.feats), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    y, z = layer(x), layer(SparseTensor(x.feats[order], x.coords[order], spatial_range=x.spatial_range))
    assert_equal(z.feats, y.feats if stride > 1 else y.feats[order])
    assert torch.equal(z.coords, y.coords if stride > 1 else y.coords[order])


@pytest.mark.parametrize(("size", "stride", "padding"), STRIDED)
def test_samples_do_not_meet(size, stride, padding):
    layer = made(3, 3, 4, size, stride, padding)
    x = grid(3, 6, 5, 7, share=0.3)
    y = layer(x)
    for sample in range(3):
        rows, kept = x.coords[:, 0] == sample, y.coords[:, 0] == sample
        alone = layer(SparseTensor(x.feats[rows], x.coords[rows], spatial_range=x.spatial_range))
        assert torch.equal(alone.coords, y.coords[kept])
        assert_equal(alone.feats, y.feats[kept])


def test_far_coordinates_are_exact():
    x = grid(2, 6, 5, 7, share=0.4, ranged=False)
    layer = made(3, 3, 4)
    far = SparseTensor(x.feats, x.coords + torch.tensor([0, *[1 << 20] * 3], dtype=torch.int32, device=DEVICE))
    assert_equal(layer(far).feats, layer(x).feats)


def test_a_weight_may_come_from_anywhere():
    x = grid(1, 6, 5, 7, share=0.4)
    layer = made(3, 3, 4)
    scattered = layer.kernel.transpose(1, 2).contiguous().transpose(1, 2)
    assert not scattered.is_contiguous()
    assert_equal(conv3d(x, scattered, 3).feats, layer(x).feats)
