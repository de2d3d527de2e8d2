"""What AWQ in vLLM claims, and how it loads: shards that are slices of the whole, whatever the layout; no engine."""

import pytest
import torch

from pronghorn.awq import AwqConfig
from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.dequantize_weight.layouts import pack

pytest.importorskip("vllm", reason="the vllm extra is not installed")
pytestmark = pytest.mark.xdist_group("vllm")


@pytest.mark.parametrize(
    ("given", "user", "claimed"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, None, None),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "pronghorn_awq", "pronghorn_awq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, None, "pronghorn_awq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq", None),
        ({"quant_method": "awq", "bits": 4, "version": "llm-awq"}, None, "pronghorn_awq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": False}, None, "pronghorn_awq"),
        ({"quant_method": "pronghorn_awq", "bits": 3, "version": "natural"}, None, "pronghorn_awq"),
        ({"quant_method": "gptq", "bits": 4}, "pronghorn_awq", None),
        # Not ours to judge: vLLM may read them, and must be able to start.
        ({"quant_method": "awq", "bits": 4, "version": "ipex"}, None, None),
        ({"quant_method": "awq", "bits": 8, "version": "gemm"}, None, None),
        ({"quant_method": "awq", "bits": 4, "version": "gemm", "modules_to_not_convert": "lm_head"}, None, None),
    ],
)
def test_which_checkpoints_are_claimed(given, user, claimed):
    from pronghorn.awq.vllm import VllmAwqConfig

    assert VllmAwqConfig.override_quantization_method(given, user) == claimed


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "bits: the checkpoint's quantization configuration lacks it"),
        ({"quant_method": "awq", "bits": 4}, "version: the checkpoint's quantization configuration lacks it"),
        ({"quant_method": "awq", "bits": 5, "version": "natural"}, "bits: got 5"),
        ({"quant_method": "awq", "bits": 4, "version": "tidy"}, "version: got 'tidy'"),
    ],
)
def test_configurations_that_say_too_little(given, named):
    from pronghorn.awq.vllm import VllmAwqConfig

    with pytest.raises(ValueError, match=named):
        VllmAwqConfig.from_config(given)


@pytest.mark.fault(21)
def test_batch_invariance_is_refused(monkeypatch):
    from vllm import envs

    from pronghorn.awq.vllm import VllmAwqConfig

    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: is set, and how pronghorn_awq rounds"):
        VllmAwqConfig(AwqConfig(version="gemv"))


def test_skipped_modules_follow_vllms_names():
    from vllm.model_executor.models.utils import WeightsMapper

    from pronghorn.awq.vllm import VllmAwqConfig

    config = VllmAwqConfig(AwqConfig(modules_to_not_convert=["model.visual", "down_proj"]))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.visual": "visual"}))
    assert config._is_skipped("visual.blocks.0.attn.proj")
    assert config._is_skipped("language_model.model.layers.0.mlp.down_proj")
    assert not config._is_skipped("language_model.model.layers.0.mlp.gate_up_proj")


class Rank:
    """A tensor-parallel rank for vLLM's parameters, without a process group."""

    def __init__(self, monkeypatch, rank, size):
        from vllm.model_executor import parameter
        from vllm.model_executor.layers import linear

        for module in (parameter, linear):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def random_weight(rows, columns, group_size, bits, layout):
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, columns // group_size, generator=generator).half() + 0.1
    zeros = torch.randint(0, 2**bits, (rows, columns // group_size), generator=generator, dtype=torch.uint8)
    if layout == "marlin":
        zeros.fill_(8)
    how = {"bits": bits, "group_size": group_size}
    natural = pack(codes, scales, zeros, layout="natural", **how)
    whole = dequantize_weight(**natural, layout="natural", **how, out_features=rows, in_features=columns)
    return pack(codes, scales, zeros, layout=layout, **how), whole


def loaded_layer(method, rows_of_rank, columns_of_rank, rows, columns, load):
    layer = torch.nn.Module()

    def loader(parameter, tensor, *args):
        load(parameter, tensor, *args)

    method.create_weights(layer, columns_of_rank, rows_of_rank, columns, rows, torch.float16, weight_loader=loader)
    return layer


def stored(layer, tensors, config, *shard):
    """Give a layer's parameters the checkpoint's tensors, as vLLM's loaders do."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, "scaled_zeros" if name == "qzeros" and config.version == "llm-awq" else name)
        parameter.weight_loader(parameter, tensor, *shard)


SHARDED = [("gemm", 4), ("gemv", 4), ("gemv_fast", 4), ("llm-awq", 4), ("exllama", 4), ("marlin", 4), ("natural", 3)]


def method_of(version, bits):
    from pronghorn.awq.vllm import AwqLinearMethod

    config = AwqConfig(version=version, bits=bits, group_size=32, zero_point=version != "marlin")
    return AwqLinearMethod(config), config


@pytest.mark.parametrize(("version", "bits"), SHARDED)
@pytest.mark.parametrize("rank", [0, 1])
def test_column_parallel_shards_are_rows_of_the_weight(monkeypatch, version, bits, rank):
    Rank(monkeypatch, rank, 2)
    method, config = method_of(version, bits)
    tensors, whole = random_weight(128, 128, 32, bits, config.layout)
    layer = loaded_layer(method, [64], 128, 128, 128, lambda p, t: p.load_column_parallel_weight(t))
    stored(layer, tensors, config)
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.dequantize_weight(layer), whole[64 * rank : 64 * rank + 64], rtol=0, atol=0)


@pytest.mark.parametrize(("version", "bits"), SHARDED)
@pytest.mark.parametrize("rank", [0, 1])
def test_row_parallel_shards_are_columns_of_the_weight(monkeypatch, version, bits, rank):
    Rank(monkeypatch, rank, 2)
    method, config = method_of(version, bits)
    tensors, whole = random_weight(64, 256, 32, bits, config.layout)
    layer = loaded_layer(method, [64], 128, 64, 256, lambda p, t: p.load_row_parallel_weight(t))
    stored(layer, tensors, config)
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.dequantize_weight(layer), whole[:, 128 * rank : 128 * rank + 128], rtol=0, atol=0)


@pytest.mark.parametrize(("version", "bits"), SHARDED)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_qkv_shards_follow_the_heads(monkeypatch, version, bits, rank):
    """Four ranks, four query heads of 64, two key/value heads that two ranks share each."""
    Rank(monkeypatch, rank, 4)
    method, config = method_of(version, bits)
    heads = {"q": (4, rank), "k": (2, rank // 2), "v": (2, rank // 2)}

    def load(parameter, tensor, shard):
        offset = {"q": 0, "k": 64, "v": 128}[shard]
        parameter.load_qkv_weight(tensor, num_heads=2, shard_id=shard, shard_offset=offset, shard_size=64)

    layer = loaded_layer(method, [64, 64, 64], 128, 512, 128, load)
    wanted = []
    for shard, (count, mine) in heads.items():
        tensors, whole = random_weight(64 * count, 128, 32, bits, config.layout)
        stored(layer, tensors, config, shard)
        wanted.append(whole[64 * mine : 64 * mine + 64])
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.dequantize_weight(layer), torch.cat(wanted), rtol=0, atol=0)


@pytest.mark.parametrize(("version", "bits"), SHARDED)
def test_merged_gate_and_up_are_sharded_each(monkeypatch, version, bits):
    Rank(monkeypatch, 1, 2)
    method, config = method_of(version, bits)

    def load(parameter, tensor, shard):
        parameter.load_merged_column_weight(tensor, shard_id=shard, shard_offset=64 * shard, shard_size=64)

    layer = loaded_layer(method, [64, 64], 128, 256, 128, load)
    wanted = []
    for shard in (0, 1):
        tensors, whole = random_weight(128, 128, 32, bits, config.layout)
        stored(layer, tensors, config, shard)
        wanted.append(whole[64:])
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.dequantize_weight(layer), torch.cat(wanted), rtol=0, atol=0)


@pytest.mark.parametrize(("version", "bits"), SHARDED)
@pytest.mark.parametrize("rank", [0, 3])
def test_fused_tensors_are_cut_by_vllms_own_layers(monkeypatch, version, bits, rank):
    """The layers that vLLM builds, four ranks: one tensor for q, k and v (4 and 2 heads of 64), one for gate and up."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    from pronghorn.awq.vllm import VllmAwqConfig

    Rank(monkeypatch, rank, 4)
    _, config = method_of(version, bits)
    how = {"bias": False, "quant_config": VllmAwqConfig(config), "params_dtype": torch.float16, "prefix": "x"}
    with set_current_vllm_config(VllmConfig()):
        qkv = QKVParallelLinear(128, 64, 4, 2, **how)
        gate_up = MergedColumnParallelLinear(128, [256, 256], **how)
    mine = {  # rows of the whole tensor
        qkv: [64 * rank, 256 + 64 * (rank // 2), 384 + 64 * (rank // 2)],
        gate_up: [64 * rank, 256 + 64 * rank],
    }
    for layer, starts in mine.items():
        tensors, whole = random_weight(512, 128, 32, bits, config.layout)
        stored(layer, tensors, config)
        layer.quant_method.process_weights_after_loading(layer)
        wanted = torch.cat([whole[start : start + 64] for start in starts])
        torch.testing.assert_close(layer.quant_method.dequantize_weight(layer), wanted, rtol=0, atol=0)


@pytest.mark.fault(2)
@pytest.mark.parametrize(("version", "bits"), SHARDED)
def test_tensors_that_cannot_be_right_are_refused(monkeypatch, version, bits):
    Rank(monkeypatch, 0, 1)

    def load(changes=(), skip=None, group_size=32):
        method, config = method_of(version, bits)
        tensors, _ = random_weight(64, 256, group_size, bits, config.layout)
        for name, change in changes:
            tensors[name] = change(tensors[name].clone())
        layer = loaded_layer(method, [64], 256, 64, 256, lambda p, t: p.load_row_parallel_weight(t))
        stored(layer, {name: tensor for name, tensor in tensors.items() if name != skip}, config)
        method.process_weights_after_loading(layer)

    load()
    for name in random_weight(64, 256, 32, bits, method_of(version, bits)[1].layout)[0]:
        with pytest.raises(ValueError, match="the checkpoint lacks"):
            load(skip=name)
        for change in (lambda tensor: tensor.flatten(), lambda tensor: tensor.bool()):
            with pytest.raises(ValueError, match=rf"Module\.({name}|scaled_zeros): the checkpoint has"):
                load([(name, change)])
    for number, named in ((float("nan"), "hold NaN or Inf"), (float("inf"), "hold NaN or Inf"), (-1.0, "negative")):
        with pytest.raises(ValueError, match=named):
            load([("scales", lambda tensor, number=number: tensor.index_fill_(0, torch.tensor([0]), number))])
    with pytest.raises(ValueError, match=r"is not layout|needs a multiple of 64"):
        load(group_size=128)


@pytest.mark.fault(2)
def test_zero_points_beyond_the_codes_are_refused(monkeypatch):
    Rank(monkeypatch, 0, 1)
    method, config = method_of("natural", 3)
    tensors, _ = random_weight(64, 256, 32, 3, "natural")
    layer = loaded_layer(method, [64], 256, 64, 256, lambda p, t: p.load_row_parallel_weight(t))
    stored(layer, {**tensors, "qzeros": tensors["qzeros"] | 8}, config)
    with pytest.raises(ValueError, match="a zero point above 7"):
        method.process_weights_after_loading(layer)


def test_shards_that_cut_a_group_are_refused(monkeypatch):
    Rank(monkeypatch, 0, 4)
    method, _ = method_of("gemm", 4)
    with pytest.raises(ValueError, match="not a whole number of groups of 32"):
        loaded_layer(method, [64], 48, 64, 192, None)


def test_partly_skipped_fused_linears_and_experts_are_refused():
    from pronghorn.awq.vllm import VllmAwqConfig

    config = VllmAwqConfig(AwqConfig(modules_to_not_convert=["q_proj"]))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ValueError, match="only some of q_proj, k_proj, v_proj"):
        config._is_skipped("model.layers.0.self_attn.qkv_proj")

    class FusedMoE(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="mixtures of experts"):
        config.get_quant_method(FusedMoE(), "model.layers.0.mlp.experts")
