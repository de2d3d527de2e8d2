"""Checkpoints change their format without loss, whole or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.faults.limited_disk import limited_disk
from tests.models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, AwqLinear, convert_checkpoint

PUBLISHED = ["gemm", "gemv", "gemv_fast", "llm-awq", "exllama", "natural"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama_mha", hidden_size=128, intermediate_size=192).save_pretrained(folder / "fp")
    config = AwqConfig(group_size=32, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(folder / "fp", dtype=torch.float16, quantization_config=config)
    model.save_pretrained(folder / "gemm", max_shard_size="60KB")
    (folder / "gemm" / "tokenizer.json").write_text("{}")
    return folder / "gemm"


def codes_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: module.codes() for name, module in model.named_modules() if isinstance(module, AwqLinear)}


def test_around_through_all_formats(checkpoint, tmp_path):
    wanted = codes_of(checkpoint)
    source = checkpoint
    for version in [*PUBLISHED[1:], "gemm"]:
        target = tmp_path / version
        convert_checkpoint(source, target, version, progress=False)
        assert (target / "tokenizer.json").exists()
        for name, parts in codes_of(target).items():
            assert all(torch.equal(a, b) for a, b in zip(parts, wanted[name], strict=True)), (version, name)
        source = target
    before, after = ({}, {})
    for found, folder in ((before, checkpoint), (after, source)):
        for path in folder.glob("*.safetensors"):
            found |= load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_a_format_cannot_hold_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="symmetric"):
        convert_checkpoint(checkpoint, tmp_path / "marlin", "marlin", progress=False)
    with pytest.raises(ValueError, match="version"):
        convert_checkpoint(checkpoint, tmp_path / "x", "x", progress=False)
    config = AwqConfig(group_size=32, method="rtn", bits=3, version="natural")
    three = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "fp", quantization_config=config)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="holds 4 bits only"):
        convert_checkpoint(tmp_path / "three", tmp_path / "gemm", "gemm", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["three"]


@pytest.mark.fault(8, 10)
def test_nothing_half_made_is_left(checkpoint, tmp_path):
    """The disk takes some files, then fills up."""
    convert_checkpoint(checkpoint, tmp_path / "whole", "gemv", progress=False)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").glob("*.safetensors"))]
    assert sizes[0] < max(sizes)
    with limited_disk(sizes[0]), pytest.raises(OSError, match=r"\d+ bytes are needed, \d+ bytes are free: '.*gemv'"):
        convert_checkpoint(checkpoint, tmp_path / "gemv", "gemv", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.fault(10)
def test_an_existing_target_is_kept(checkpoint, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="overwrite"):
        convert_checkpoint(checkpoint, tmp_path / "old", "gemv", progress=False)
    assert (tmp_path / "old" / "precious").exists()
    convert_checkpoint(checkpoint, tmp_path / "old", "gemv", overwrite=True, progress=False)
    assert not (tmp_path / "old" / "precious").exists()


def test_the_source_is_never_the_target(checkpoint):
    for target in (checkpoint, checkpoint.parent):
        with pytest.raises(ValueError, match="would be lost"):
            convert_checkpoint(checkpoint, target, "gemv", overwrite=True, progress=False)
    assert (checkpoint / "config.json").exists()


@pytest.mark.fault(2)
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_damaged_checkpoints_are_not_passed_on(checkpoint, tmp_path, part):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    for path in (tmp_path / "damaged").glob("*.safetensors"):
        tensors = {name: t for name, t in load_file(path).items() if name != f"model.layers.1.mlp.up_proj.{part}"}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        convert_checkpoint(tmp_path / "damaged", tmp_path / "out", "gemv", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_quantized_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no quantization_config"):
        convert_checkpoint(tmp_path, tmp_path.parent / "out", "gemv")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        convert_checkpoint(tmp_path, tmp_path.parent / "out", "gemv")
    (tmp_path / "model.safetensors").write_bytes(b"0123")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        convert_checkpoint(tmp_path, tmp_path.parent / "out", "gemv", progress=False)


def test_llm_awqs_own_file_is_read(checkpoint, tmp_path):
    """A `-v2.pt`: a pickled state dict with scaled_zeros, and a side file."""
    convert_checkpoint(checkpoint, tmp_path / "v2", "llm-awq", progress=False)
    state = {}
    for path in (tmp_path / "v2").glob("*.safetensors"):
        state |= load_file(path)
    (tmp_path / "pt").mkdir()
    torch.save(state, tmp_path / "pt" / "model-w4-g32-v2.pt")
    config = json.loads((tmp_path / "v2" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "pt" / "config.json").write_text(json.dumps(config))
    side = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "llm-awq"}
    (tmp_path / "pt" / "quant_config.json").write_text(json.dumps(side))
    convert_checkpoint(tmp_path / "pt", tmp_path / "gemm", "gemm", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemm")
    assert torch.equal(model(token_ids()).logits, AutoModelForCausalLM.from_pretrained(checkpoint)(token_ids()).logits)
