"""Conversion from SpConv against outputs of SpConv itself, and a model as OpenPCDet writes them, without SpConv."""

import copy
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pronghorn.torchsparse import convert
from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.config import ConvConfig
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.tensor import SparseTensor, set_tensor_cache_mode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parent / "data" / "spconv_cpu.safetensors"


class SparseConvTensor:
    """What user code touches of SpConv's tensor."""

    def __init__(self, features, indices, spatial_shape, batch_size, indice_dict=None):
        self.features, self.indices = features, indices
        self.spatial_shape, self.batch_size = [int(size) for size in spatial_shape], batch_size
        self.indice_dict = {} if indice_dict is None else indice_dict

    def replace_feature(self, features):
        return SparseConvTensor(features, self.indices, self.spatial_shape, self.batch_size, self.indice_dict)

    def dense(self):
        grid = self.features.new_zeros(self.batch_size, *self.spatial_shape, self.features.shape[1])
        return grid.index_put(tuple(self.indices.long().T), self.features).movedim(-1, 1)


class SparseModule(nn.Module):
    def __init__(self, name=None):
        super().__init__()
        self.name = name


class SparseSequential(SparseModule, nn.Sequential):
    def __init__(self, *layers):
        SparseModule.__init__(self)
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def forward(self, input):
        for layer in self:
            input = layer(input) if isinstance(layer, SparseModule) else input.replace_feature(layer(input.features))
        return input


class SparseConvolution(SparseModule):
    """The parts of SpConv's layer that are converted; it computes nothing."""

    subm = inverse = transposed = False

    def __init__(self, inputs, outputs, kernel_size, stride=1, padding=0, dilation=1, bias=True, indice_key=None):
        super().__init__()
        self.ndim, self.in_channels, self.out_channels, self.indice_key = 3, inputs, outputs, indice_key
        self.kernel_size, self.stride, self.padding, self.dilation = (
            [value] * 3 if isinstance(value, int) else list(value) for value in (kernel_size, stride, padding, dilation)
        )
        self.weight = nn.Parameter(torch.randn(outputs, *self.kernel_size, inputs) / 5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None
        self.act_type = "Activation.None_"


class SubMConv3d(SparseConvolution):
    subm = True


class SparseConv3d(SparseConvolution):
    pass


class SparseInverseConv3d(SparseConvolution):
    inverse = True


class SparseConvTranspose3d(SparseConvolution):
    transposed = True


def golden():
    with safe_open(GOLDEN, framework="pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items() if key != "note"}
        tensors = {key: file.get_tensor(key).to(DEVICE) for key in file.keys()}  # noqa: SIM118 - no mapping
    return about, {key: value.int() if value.dtype == torch.int8 else value for key, value in tensors.items()}


ABOUT, TENSORS = golden()


def in_order(indices, features):
    place = torch.zeros(len(indices), dtype=torch.int64, device=indices.device)
    for column in indices.long().T:
        place = place * 64 + column
    order = place.argsort()
    return indices[order], features[order]


def far(ours, theirs):
    return float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    monkeypatch.setattr(settings, "allow_tf32", False)


def stand_in(name):
    case = ABOUT["cases"][name]
    options = {key: value for key, value in case["options"].items() if key != "spatial_shape"}
    layer = globals()[case["kind"]](*case["args"], **options)
    parts = {key.removeprefix(f"{name}."): value for key, value in TENSORS.items() if key.startswith(f"{name}.")}
    layer.load_state_dict({key: parts[key] for key in ("weight", "bias") if key in parts})
    return layer.to(DEVICE), parts, case["options"]["spatial_shape"]


@pytest.mark.parametrize("name", ABOUT["cases"])
@pytest.mark.parametrize("mode", ["hashmap_on_the_fly", "hashmap"])
def test_a_layer_gives_what_spconv_gave(name, mode, monkeypatch):
    monkeypatch.setattr(settings, "config", ConvConfig(kmap_mode=mode, downsample_mode="minkowski"))
    layer, parts, shape = stand_in(name)
    layer = convert.replace_spconv(layer)
    x = TENSORS["features"].clone().requires_grad_()
    y = layer(SparseConvTensor(x, TENSORS["indices"], ABOUT["shape"], 2))
    indices, features = in_order(y.indices, y.features)
    assert y.spatial_shape == shape
    assert torch.equal(indices, parts["y_indices"])
    assert far(features, parts["y"]) < 1e-6
    (features.square().sum() / 2).backward()
    assert far(x.grad, parts["gx"]) < 2e-6
    gradient = convert.to_spconv2_state_dict({"kernel": layer.kernel.grad}, {"": layer.kernel_size})["weight"]
    assert far(gradient, parts["gweight"]) < 2e-6
    if "back.z" in parts:
        back = SparseInverseConv3d(5, 4, layer.kernel_size, bias=False, indice_key=layer.indice_key).to(DEVICE)
        back.weight.data.copy_(parts["back.weight"])
        pair = nn.ModuleList([stand_in(name)[0], back])
        z = convert.replace_spconv(pair)[1](y)
        assert z.indices is TENSORS["indices"]
        indices, features = in_order(z.indices, z.features)
        assert torch.equal(indices, parts["back.z_indices"])
        assert far(features, parts["back.z"]) < 1e-6


@pytest.mark.parametrize("name", ABOUT["cases"])
def test_converted_weights_in_our_own_layers(name):
    layer, parts, shape = stand_in(name)
    state = convert.convert_state_dict(layer.state_dict(), strided=[""] if name == "down1" else [])
    stride, padding = (1, 0) if layer.subm else (layer.stride, layer.padding)
    ours = spnn.Conv3d(4, 5, layer.kernel_size, stride, padding, layer.dilation, bias=layer.bias is not None).to(DEVICE)
    ours.load_state_dict(state)
    x = convert.from_spconv(SparseConvTensor(TENSORS["features"], TENSORS["indices"], ABOUT["shape"], 2))
    y = ours(x)
    assert list(y.spatial_range[1:]) == shape
    assert far(in_order(y.coords, y.feats)[1], parts["y"]) < 1e-6


class Block(SparseModule):
    """A residual block as OpenPCDet has it."""

    def __init__(self, channels, key):
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, 3, padding=1, indice_key=key)
        self.bn1 = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.conv1(x)
        out = out.replace_feature(self.relu(self.bn1(out.features)))
        return out.replace_feature(out.features + x.features)


def block(layer):
    return SparseSequential(layer, nn.BatchNorm1d(layer.out_channels), nn.ReLU())


class Backbone(nn.Module):
    """A small VoxelBackBone8x with a way back up."""

    def __init__(self):
        super().__init__()
        self.conv_input = block(SubMConv3d(4, 8, 3, padding=1, bias=False, indice_key="subm1"))
        self.conv1 = SparseSequential(block(SubMConv3d(8, 8, 3, indice_key="subm1")), Block(8, "subm1"))
        self.conv2 = SparseSequential(
            block(SparseConv3d(8, 16, 3, 2, 1, bias=False, indice_key="spconv2")),
            block(SubMConv3d(16, 16, 3, indice_key="subm2")),
        )
        self.conv_out = block(SparseConv3d(16, 8, (3, 1, 1), (2, 1, 1), bias=False, indice_key="spconv_down2"))
        self.inv2 = block(SparseInverseConv3d(16, 8, 3, bias=False, indice_key="spconv2"))

    def forward(self, features, indices):
        x = SparseConvTensor(features, indices, [9, 8, 7], 2)
        low = self.conv1(self.conv_input(x))
        high = self.conv2(low)
        up = self.inv2(high)
        assert up.indices is indices
        return self.conv_out(high).dense(), up.features + low.features


def dense_backbone(model, features, indices):
    """The same by dense convolutions, with batch norms over the sites alone."""
    weights = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseConvolution)}

    def grid(values, sites, shape):
        return SparseConvTensor(values, sites, shape, 2).dense()

    def convolve(name, values, sites, shape, to=None, stride=1, padding=1):
        layer, kernel = weights[name], weights[name].weight.movedim(-1, 1)
        found = nn.functional.conv3d(grid(values, sites, shape), kernel, layer.bias, stride, padding)
        if to is None:
            return found
        return found.movedim(1, -1)[tuple(to.long().T)]

    def rest(name, values):
        return model.get_submodule(name).relu(values) if name == "relu" else model.get_submodule(name)(values)

    shape, half = [9, 8, 7], [5, 4, 4]
    x = convolve("conv_input.0", features, indices, shape, indices)
    x = rest("conv_input.2", rest("conv_input.1", x))
    x = convolve("conv1.0.0", x, indices, shape, indices)
    x = rest("conv1.0.2", rest("conv1.0.1", x))
    inner = convolve("conv1.1.conv1", x, indices, shape, indices)
    low = rest("conv1.1.relu", rest("conv1.1.bn1", inner)) + x
    ones = grid(torch.ones_like(features[:, :1]), indices, shape)
    reached = nn.functional.conv3d(ones, ones.new_ones(1, 1, 3, 3, 3), stride=2, padding=1)[:, 0]
    sites = reached.nonzero().int()
    high = convolve("conv2.0.0", low, indices, shape, sites, 2)
    high = rest("conv2.0.2", rest("conv2.0.1", high))
    high = convolve("conv2.1.0", high, sites, half, sites)
    high = rest("conv2.1.2", rest("conv2.1.1", high))
    kernel = weights["inv2.0"].weight.movedim(-1, 0)
    up = nn.functional.conv_transpose3d(grid(high, sites, half), kernel, None, 2, 1, (0, 1, 0))
    up = up.movedim(1, -1)[tuple(indices.long().T)]
    up = rest("inv2.2", rest("inv2.1", up))
    out = convolve("conv_out.0", high, sites, half, None, (2, 1, 1), 0)
    ones = grid(torch.ones_like(high[:, :1]), sites, half)
    at = nn.functional.conv3d(ones, ones.new_ones(1, 1, 3, 1, 1), stride=(2, 1, 1))[:, 0].nonzero().int()
    values = rest("conv_out.2", rest("conv_out.1", out.movedim(1, -1)[tuple(at.long().T)]))
    return grid(values, at, [2, 4, 4]), up + low


@pytest.mark.parametrize("shared_cache", [False, True])
def test_a_model_goes_on_working_in_place(shared_cache):
    torch.manual_seed(0)
    model = Backbone().double().to(DEVICE)
    features, indices = TENSORS["features"].double().requires_grad_(), TENSORS["indices"]
    wanted = dense_backbone(copy.deepcopy(model), features, indices)
    frozen = model.conv1[0][0].weight.requires_grad_(False)
    keys = set(model.state_dict())
    set_tensor_cache_mode(shared_cache)
    try:
        assert convert.replace_spconv(model) is model
        found = copy.deepcopy(model)(features, indices)
    finally:
        set_tensor_cache_mode(False)
    assert max(far(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)) < 1e-12
    assert {key.replace("kernel", "weight") for key in model.state_dict()} == keys
    assert not model.conv1[0][0].kernel.requires_grad
    assert not frozen.requires_grad
    (of_features,) = torch.autograd.grad(sum(part.square().sum() for part in wanted), features)
    (ours,) = torch.autograd.grad(sum(part.square().sum() for part in found), features)
    assert far(ours, of_features) < 1e-10


def test_checkpoints_fit_a_replaced_model_and_go_back():
    model = Backbone()
    state = copy.deepcopy(model.state_dict())
    convert.replace_spconv(model)
    assert all(torch.equal(a, b) for a, b in zip(convert.convert_state_dict(state).values(),
                                                 model.state_dict().values(), strict=True))  # fmt: skip
    sizes = {name: layer.kernel_size for name, layer in model.named_modules() if hasattr(layer, "kernel")}
    back = convert.to_spconv2_state_dict(model.state_dict(), sizes)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_shared_layers_stay_shared():
    layer = SubMConv3d(4, 4, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer)})
    convert.replace_spconv(model)
    assert model["a"] is model["b"] is model["c"][0]
    assert isinstance(model["a"], SparseModule)
    assert isinstance(model["a"], convert.SpconvConvolution)


def test_what_is_left_to_spconv_is_said(caplog):
    model = nn.ModuleDict({
        "spreads": SparseConv3d(4, 4, 3, padding=1, indice_key="x"),
        "back": SparseInverseConv3d(4, 4, 3, indice_key="x"),
        "new": SparseConvTranspose3d(4, 4, 2, 2),
        "shifted": SparseConv3d(4, 4, 3, (2, 1, 1)),
        "even": SubMConv3d(4, 4, 2),
        "active": SubMConv3d(4, 4, 3),
        "fine": SubMConv3d(4, 4, 3),
    })  # fmt: skip
    model["active"].act_type = "Activation.ReLU"
    with caplog.at_level(logging.WARNING):
        convert.replace_spconv(model)
    assert [name for name, layer in model.items() if isinstance(layer, convert.SpconvConvolution)] == ["fine"]
    assert len(caplog.records) == 6
    assert "back is left to SpConv: the layer with indice_key 'x' is not replaced" in caplog.text


def test_errors_of_replacing():
    with pytest.raises(ValueError, match="module: Linear has no sparse convolution of SpConv"):
        convert.replace_spconv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="source: got 'minkowski', accepted are spconv2, spconv1"):
        convert.replace_spconv(SubMConv3d(4, 4, 3), source="minkowski")
    with pytest.raises(ValueError, match=r"source: a weight \(5, 3, 3, 3, 4\) of 4 input and 5 output channels is not"):
        convert.replace_spconv(SubMConv3d(4, 5, 3), source="spconv1")
    pair = nn.ModuleList([SparseConv3d(4, 4, 3, 2, indice_key="x"), SparseInverseConv3d(4, 4, 3, indice_key="x")])
    convert.replace_spconv(pair)
    with pytest.raises(ValueError, match="indice_key: no convolution with 'x' made the sites"):
        pair[1].to(DEVICE)(SparseConvTensor(TENSORS["features"], TENSORS["indices"], ABOUT["shape"], 2))
    with pytest.raises(TypeError, match="tensor: got SparseTensor without features, indices, spatial_shape"):
        convert.from_spconv(SparseTensor(TENSORS["features"], TENSORS["indices"]))


def test_version_1_has_other_weights():
    weight = torch.randn(5, 3, 1, 5, 4)
    first, second = ({"a.weight": value, "a.bias": torch.ones(5)} for value in (weight.movedim(0, -1), weight))
    old, new = convert.convert_state_dict(first, "spconv1"), convert.convert_state_dict(second)
    assert list(old) == ["a.kernel", "a.bias"]
    assert torch.equal(old["a.kernel"], new["a.kernel"])
    assert torch.equal(new["a.kernel"][1 + 3 * (0 + 1 * 2)], weight[:, 1, 0, 2].T)
    one = torch.randn(1, 1, 1, 4, 5)
    assert torch.equal(convert.convert_state_dict({"weight": one}, "spconv1")["kernel"], one[0, 0, 0])
    assert convert.convert_state_dict({"weight": one}, "spconv1", strided=[""])["kernel"].shape == (1, 4, 5)


def test_only_sparse_weights_change():
    state = {"bn.weight": torch.ones(3), "linear.weight": torch.ones(3, 3), "bev.weight": torch.ones(3, 3, 3, 3),
             "sparse.weight": torch.ones(3, 2, 2, 2, 3), "step": 7}  # fmt: skip
    found = convert.convert_state_dict(state)
    assert list(found) == ["bn.weight", "linear.weight", "bev.weight", "sparse.kernel", "step"]
    assert convert.convert_state_dict(state, names=["bev"])["bev.kernel"].shape == (9, 3, 3)
    for arguments in ({"names": ["nobody"]}, {"strided": ["bev"]}, {"kernel_sizes": {"bev": 3}}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: no sparse convolution is called"):
            convert.convert_state_dict(state, **arguments)
    with pytest.raises(ValueError, match="source: got 'torch', accepted are spconv2, spconv1, minkowski"):
        convert.convert_state_dict(state, "torch")


@pytest.mark.parametrize("size", [(2, 2, 2), (3, 3, 3), (3, 2, 4), (1, 1, 1)])
def test_minkowski_runs_through_the_first_dimension_fastest(size):
    volume = size[0] * size[1] * size[2]
    weight = torch.randn(*size, 4, 5)
    theirs = weight.permute(2, 1, 0, 3, 4).reshape(volume, 4, 5)
    theirs = theirs[0] if volume == 1 else theirs
    state = {"c.kernel": theirs, "c.bias": torch.ones(1, 5), "norm.bn.weight": torch.ones(5), "bn.bias": torch.ones(5)}
    sizes = {"c": size} if len(set(size)) > 1 else None
    found = convert.convert_state_dict(state, "minkowski", sizes)
    assert list(found) == ["c.kernel", "c.bias", "norm.weight", "bias"]
    assert found["c.bias"].shape == (5,)
    ours = weight.movedim(-1, 0).contiguous()
    ours = convert.convert_state_dict({"c.weight": ours})["c.kernel"] if volume > 1 else weight[0, 0, 0]
    assert torch.equal(found["c.kernel"], ours)


def test_sizes_that_are_no_cubes_are_asked_for():
    with pytest.raises(ValueError, match="kernel_sizes: 'c' has 12 offsets"):
        convert.convert_state_dict({"c.kernel": torch.ones(12, 4, 5)}, "minkowski")
    with pytest.raises(ValueError, match="kernel_sizes: 'c' has 12 offsets"):
        convert.to_spconv2_state_dict({"c.kernel": torch.ones(12, 4, 5)}, {"c": 2})


def test_tensors_come_and_go(monkeypatch):
    features, indices = TENSORS["features"], TENSORS["indices"]
    x = convert.from_spconv(SparseConvTensor(features, indices, ABOUT["shape"], 2))
    assert x.feats is features
    assert x.coords is indices
    assert x.spatial_range == (2, *ABOUT["shape"])
    module = types.ModuleType("spconv.pytorch")
    module.SparseConvTensor = SparseConvTensor
    monkeypatch.setitem(sys.modules, "spconv", types.ModuleType("spconv"))
    monkeypatch.setitem(sys.modules, "spconv.pytorch", module)
    y = convert.to_spconv(x)
    assert (y.features, y.indices, y.spatial_shape, y.batch_size) == (features, indices, ABOUT["shape"], 2)
    scattered = SparseTensor(features, indices.T.contiguous().T, spatial_range=x.spatial_range)
    assert convert.to_spconv(scattered).indices.is_contiguous()
    with pytest.raises(ValueError, match="tensor: has no spatial_range"):
        convert.to_spconv(SparseTensor(features, indices))
