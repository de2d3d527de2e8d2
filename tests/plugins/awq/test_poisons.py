"""Weights and activations at the edge of their dtype: finite scales, no worse than rounding, or a name in an error."""

import pytest
import torch
from tests.kernels.harness import DEVICE
from tests.models import tiny_model, token_ids

from pronghorn.awq import AwqConfig, AwqSearch, quantize_model
from pronghorn.awq.layers import AwqLinear

TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 2e-7}  # below the least normal number


def zero_channels(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[:, 5] = layer.mlp.up_proj.weight[7] = 0
        layer.mlp.down_proj.weight[:, :32] = 0  # a whole group
        layer.input_layernorm.weight[3] = 0  # an input that is never anything else
        layer.self_attn.k_proj.weight.zero_()


def constant_channels(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[:, 5] = layer.mlp.up_proj.weight[7] = 0.3
        layer.self_attn.v_proj.weight.fill_(0.1)


def outliers(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[3, 4] *= 1e4
        layer.input_layernorm.weight[9] *= 1e4


def denormals(model):
    model.model.layers[0].mlp.up_proj.weight.fill_(TINY[model.dtype])[::2] *= 3
    model.model.layers[1].self_attn.v_proj.weight *= TINY[model.dtype]


POISONS = (zero_channels, constant_channels, outliers, denormals)


@pytest.mark.fault(6)
@pytest.mark.parametrize("zero_point", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("poison", POISONS)
@torch.no_grad()
def test_scales_are_finite_and_no_worse_than_rounding(poison, dtype, zero_point, figure):
    model, ids = tiny_model("llama_mha").to(DEVICE, dtype), token_ids(2, 32).to(DEVICE)
    clean = model(ids).logits
    poison(model)
    assert not torch.equal(model(ids).logits, clean)
    assert model(ids).logits.isfinite().all()
    config = AwqConfig(group_size=32, zero_point=zero_point, grid=6)
    result = AwqSearch(config, progress=False).run(model, [ids])
    assert all(scale.isfinite().all() and (scale > 0).all() for _, _, scale in result.scale)
    assert all(maximum.isfinite().all() for _, maximum in result.clip)
    groups = [group for block in result.report for group in block["groups"]]
    # What denormal numbers lead to has no measurable influence in these two, and no scale.
    assert len(groups) == 2 * 4 - 2 * (poison is denormals and dtype != torch.float16)
    assert all(group["losses"][group["best"]] <= group["losses"][0] for group in groups)
    rounded = [name for block in result.report for name in block["unreached"]]
    assert rounded == []
    result.apply(model)
    quantize_model(model, config, progress=False)
    packed = [module for module in model.modules() if isinstance(module, AwqLinear)]
    assert len(packed) == 14
    assert all(module.scales.isfinite().all() for module in packed)
    assert model(ids).logits.isfinite().all()
    figure("linears only rounded to nearest", len(rounded))


@pytest.mark.fault(6)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
             "model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
)  # fmt: skip
def test_a_weight_that_is_no_number_is_named(name, value):
    model = tiny_model("llama").to(DEVICE)
    AwqSearch(AwqConfig(group_size=32, grid=2, clip=False), progress=False).run(model, [token_ids(1, 8)])
    model.get_parameter(name).data.view(-1)[-1] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^{name}: holds NaN or Inf"):
        AwqSearch(AwqConfig(group_size=32), progress=False).run(model, [token_ids()])
    if "proj" in name:
        with pytest.raises(ValueError, match=f"{name}: holds NaN or Inf"):
            quantize_model(model, AwqConfig(group_size=32), progress=False)
    assert not [module for module in model.modules() if isinstance(module, AwqLinear)]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.fault(6)
def test_float16_that_overflows_is_named():
    model = tiny_model("llama").half().to(DEVICE)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match=r"^model\.layers\.0: .* activations overflow its dtype"):
        AwqSearch(AwqConfig(group_size=32), progress=False).run(model, [token_ids()])
    wide = tiny_model("llama").to(DEVICE)
    wide.model.layers[1].mlp.up_proj.weight.data[3, 4] = 5e6  # in float32, but scales are float16
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN or Inf in torch\.float16"):
        quantize_model(wide, AwqConfig(group_size=32), progress=False)


@pytest.mark.fault(7)
def test_samples_that_are_repeated_change_nothing():
    ids = token_ids(1, 32)
    once, twice = (
        AwqSearch(AwqConfig(group_size=32, grid=6), progress=False).run(tiny_model("llama"), [ids] * count)
        for count in (1, 2)
    )
    for ours, theirs in zip(once.scale, twice.scale, strict=True):
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-6)
