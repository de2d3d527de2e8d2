"""AWQ through transformers' front door."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, AwqLinear, prepare_lora
from pronghorn.awq.layers import ScaledActivation

VERSIONS = ["gemm", "gemv", "gemv_fast", "llm-awq", "exllama", "marlin", "natural"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A saved full-precision model that every layout can hold."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama_mha", hidden_size=128, intermediate_size=192).save_pretrained(folder)
    return folder


def quantized(folder, **changes):
    dtype = changes.pop("dtype", torch.float32)
    settings = {"group_size": 32, "grid": 4, "calibration": [token_ids()], **changes}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=AwqConfig(**settings))


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("version", VERSIONS)
def test_every_format_comes_back_bit_by_bit(llama, tmp_path, version):
    model = quantized(llama, version=version, zero_point=version != "marlin")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(model, again)
    ids = token_ids()
    assert torch.equal(model(ids).logits, again(ids).logits)
    tokens = again.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False))
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == ("pronghorn_awq" if version == "natural" else "awq")


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (8, torch.float16)])
def test_other_widths_and_dtypes(llama, tmp_path, bits, dtype):
    model = quantized(llama, bits=bits, version="natural", dtype=dtype)
    model.save_pretrained(tmp_path)
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_more_bits_are_nearer(llama):
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    wanted = reference(token_ids()).logits
    errors = [
        (quantized(llama, bits=bits, version="natural")(token_ids()).logits - wanted).norm().item()
        for bits in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * wanted.norm()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox", "opt", "gemma2", "deepseek_v3"])
def test_other_families_come_back(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "fp")
    model = quantized(tmp_path / "fp", version="natural")
    model.save_pretrained(tmp_path / "q")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    same_state(model, again)
    assert torch.equal(model(token_ids()).logits, again(token_ids()).logits)
    scaled = [name for name, module in again.named_modules() if isinstance(module, ScaledActivation)]
    assert bool(scaled) == (family == "gpt_neox")


def test_a_published_gemm_checkpoint(tmp_path):
    """Names and configuration as AutoAWQ writes them, `version` in capitals, an extra key, fp16."""
    model = quantized_folder(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    published = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
    config["quantization_config"] = {**published, "modules_to_not_convert": None, "backend": "autoawq"}
    path.write_text(json.dumps(config))
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def quantized_folder(folder, **changes):
    tiny_model("llama").save_pretrained(folder / "fp")
    model = quantized(folder / "fp", **{"method": "rtn", **changes})
    model.save_pretrained(folder)
    return model


def test_left_out_linears_stay(tmp_path):
    model = quantized_folder(tmp_path, modules_to_not_convert=["down_proj", "layers.0"])
    packed = {name for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    assert "model.layers.1.mlp.up_proj" in packed
    assert not any("down_proj" in name or "layers.0" in name for name in packed)
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_saved_search_is_used(llama, tmp_path):
    from pronghorn.awq import AwqSearch

    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = AwqConfig(group_size=32, grid=4)
    AwqSearch(config, progress=False).run(reference, [token_ids()]).save(tmp_path / "awq.pt")
    same_state(quantized(llama, search_result=str(tmp_path / "awq.pt"), calibration=[]), quantized(llama))


def test_dequantize_gives_plain_linears(tmp_path):
    model = quantized_folder(tmp_path)
    wanted = model(token_ids()).logits
    plain = model.dequantize()
    assert not any(isinstance(module, AwqLinear) for module in plain.modules())
    torch.testing.assert_close(plain(token_ids()).logits, wanted, rtol=1e-5, atol=1e-5)


def test_copies_casts_and_compiles(tmp_path):
    model = quantized_folder(tmp_path)
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.in_features)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):  # noqa: S301 - our own bytes
        assert torch.equal(other(x), linear(x))
    half = copy.deepcopy(linear).half()
    assert half.qweight.dtype == torch.int32
    assert half.scales.dtype == torch.float16
    assert half(x.half()).dtype == torch.float16
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), linear(x))
    assert linear.packed_tensors().keys() == {"qweight", "qzeros", "scales"}


def test_lora_trains_on_packed_linears(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = quantized_folder(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, prepare_lora(LoraConfig(r=4, target_modules=["q_proj", "up_proj"])))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    ids, losses = token_ids(4, 16), []
    for _ in range(20):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, tensor in before.items():
        kept = adapted.get_submodule("base_model.model").state_dict()
        key = name if name in kept else name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(kept[key], tensor), name
    with pytest.raises(ValueError, match="dequantize"):
        adapted.merge_and_unload()
    wanted = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = prepare_lora(LoraConfig.from_pretrained(tmp_path / "adapter"))
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)(ids).logits, wanted)


UP = "model.layers.0.mlp.up_proj"


def damage(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def renamed(tensors):
    tensors["model.layers.0.mlp.up.qweight"] = tensors.pop(f"{UP}.qweight")


DAMAGES = {
    "missing": (lambda t: t.pop(f"{UP}.qzeros"), "up_proj.qzeros"),
    "renamed": (renamed, "up_proj.qweight"),
    "wrong shape": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:32].clone()}), "up_proj.qweight.*shape"),
    "wrong dtype": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}), "up_proj.qweight.*int64"),
    "float codes": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}), "up_proj.qweight.*float32"),
    "a norm is missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "one tensor too many": (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.scales"].clone()}), "up_proj.g_idx"),
    "a bias that is none": (lambda t: t.update({f"{UP}.bias": t[f"{UP}.scales"][0].clone()}), "up_proj.bias"),
    "NaN scale": (lambda t: t[f"{UP}.scales"].fill_(float("nan")), "up_proj.scales"),
    "negative scale": (lambda t: t[f"{UP}.scales"].neg_(), "up_proj.scales"),
}


@pytest.mark.fault(2)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoints_are_refused(tmp_path, kind):
    quantized_folder(tmp_path)
    change, named = DAMAGES[kind]
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_configuration_takes_the_users(tmp_path):
    model = quantized_folder(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AwqConfig(group_size=32))
    same_state(model, again)


@pytest.mark.fault(2)
def test_pickled_checkpoints_are_checked_too(tmp_path):
    tiny_model("gpt_neox").save_pretrained(tmp_path / "fp")
    model = quantized(tmp_path / "fp")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.save(
        {name: tensor for name, tensor in state.items() if "dense.qzeros" not in name}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"dense\.qzeros"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_mixtral_under_its_published_names(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "fp")
    model = quantized(tmp_path / "fp", method="rtn")
    model.save_pretrained(tmp_path)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    state = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.") if ".experts." in name else name
        state[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
    assert any("block_sparse_moe.experts.0.w1.qweight" in name for name in state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(model, again)
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == state.keys()


def test_the_configuration_of_llm_awqs_converter(llama, tmp_path):
    model = quantized(llama, method="rtn", version="llm-awq")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "awq", "backend": "llm-awq", "bits": 4, "group_size": 32,
                                     "version": "gemv", "zero_point": True}  # fmt: skip
    path.write_text(json.dumps(config))
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.fault(2)
def test_a_zero_point_beyond_the_codes_is_refused(tmp_path):
    quantized_folder(tmp_path, bits=3, version="natural")
    damage(tmp_path, lambda tensors: tensors[f"{UP}.qzeros"].fill_(8))
    with pytest.raises(ValueError, match="above 7"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.fault(2)
def test_quantized_tensors_of_an_unquantized_linear_are_refused(tmp_path):
    quantized_folder(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["up_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="modules_to_not_convert"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.fault(1)
def test_a_truncated_file_is_refused(tmp_path):
    quantized_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": 5}, "bits"),
        ({"version": "gemn"}, "version"),
        ({"group_size": 48}, "group_size"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(tmp_path, changes, named):
    quantized_folder(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.fault(6, 7)
def test_bad_weights_and_data_leave_nothing_behind(llama, tmp_path):
    poisoned = tiny_model("llama")
    poisoned.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("inf")
    poisoned.save_pretrained(tmp_path / "fp")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: holds NaN or Inf"):
        quantized(tmp_path / "fp")
    with pytest.raises(ValueError, match="group_size: 80 does not divide"):
        quantized(llama, group_size=80)
    with pytest.raises(ValueError, match="calibration: empty"):
        quantized(llama, calibration=[])
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        quantized(llama, calibration="builtin")
    with pytest.raises(ValueError, match="vocabulary ends at 127"):
        quantized(llama, calibration=[[1, 2, 400]])
