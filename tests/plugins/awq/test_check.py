"""What AWQ says of packed checkpoints to `pronghorn check`: each part that cannot be right, by its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import tiny_model
from transformers import AutoModelForCausalLM

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig
from pronghorn.awq.check import check_files
from pronghorn.checkpoint import Checkpoint
from pronghorn.cli.check import check

FORMATS = {"gemm": 4, "gemv": 4, "gemv_fast": 4, "llm-awq": 4, "exllama": 4, "marlin": 4, "natural": 3}
LINEAR = "model.layers.1.mlp.down_proj"
WHOLE = "model.safetensors"


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Checkpoints of one tiny model in all formats, and the model."""
    root = tmp_path_factory.mktemp("packed")
    tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(root / "source")
    for version, bits in FORMATS.items():
        config = AwqConfig(
            group_size=32, method="rtn", version=version, bits=bits, zero_point=version != "marlin"
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32, quantization_config=config)
        model.save_pretrained(root / version)
    return root


def failures(folder):
    return [one for one in check_files(Checkpoint(folder, "transformers")) if one.state != "ok"]


def changed(folder, change):
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


def put(part, value):
    def change(tensors):
        tensors[f"{LINEAR}.{part}"].view(-1)[0] = value

    return change


def removed(part):
    return lambda tensors: tensors.pop(f"{LINEAR}.{part}")


def shorter(part):
    return lambda tensors: tensors.update({f"{LINEAR}.{part}": tensors[f"{LINEAR}.{part}"][:-1].contiguous()})


@pytest.mark.parametrize(
    "version", [pytest.param(name, marks=() if name in ("gemm", "natural") else pytest.mark.slow) for name in FORMATS]
)
def test_whole_checkpoints_pass_and_answer_as_their_source(packed, version):
    findings = {one.name: one for one in check(packed / version, "transformers", str(packed / "source"), 0.1)}
    assert {one.state for name, one in findings.items() if name != "tokenizer"} == {"ok"}
    assert "14 linears" in findings["AWQ packing"].detail


@pytest.mark.fault(2)
@pytest.mark.parametrize("version", FORMATS)
def test_each_part_that_cannot_be_right_is_named(packed, tmp_path, version):
    faults = {
        "scales": [put("scales", number) for number in (0.0, -1.0, float("nan"), float("inf"))],
        "qweight": [shorter("qweight")],
    }
    zeros = "scaled_zeros" if version == "llm-awq" else "qzeros"
    if version != "marlin":
        faults["qzeros"] = [removed(zeros), shorter(zeros)]
        faults["qweight"].append(removed("qweight"))  # marlin's is missed when it is loaded
    if version in ("gemv_fast", "llm-awq"):
        faults[zeros] = [put(zeros, 1e3), put(zeros, -1e3), put(zeros, float("nan"))]
    if version == "natural":
        faults["qzeros"].append(put("qzeros", 8))  # of 3 bits
    faults["scales"].append(removed("scales"))
    for part, changes in faults.items():
        for number, change in enumerate(changes):
            folder = shutil.copytree(packed / version, tmp_path / f"{part}{number}")
            assert failures(folder) == []
            changed(folder, change)
            found = failures(folder)
            assert len(found) == 1, (part, number)
            assert found[0].name == "AWQ packing"
            assert LINEAR in found[0].detail
            # Shapes are told from the codes: what does not fit codes that were cut is named in their place.
            assert part == "qweight" or part in found[0].detail, (part, number, found[0])
            assert found[0].remedy


@pytest.mark.fault(2, 3)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"group_size": 64}, "qzeros: got shape"),
        ({"group_size": -5}, "group_size: got -5"),
        ({"bits": 8}, "version: 'gemm' holds 4 bits only"),
        ({"version": "exllama"}, "got shape"),
        ({"version": "tidy"}, "version: got 'tidy'"),
    ],
)
def test_a_configuration_of_other_weights(packed, tmp_path, changes, named):
    folder = shutil.copytree(packed / "gemm", tmp_path / "copy")
    assert failures(folder) == []
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    assert any(named in one.detail for one in failures(folder)), failures(folder)


def test_other_checkpoints_are_not_ours(packed):
    assert list(check_files(Checkpoint(packed / "source", "transformers"))) == []


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("version", ["gemm", "natural"])
def test_in_vllm(packed, version):
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    findings = {one.name: one for one in check(packed / version, "vllm", str(packed / "source"), 0.1)}
    assert {one.state for name, one in findings.items() if name != "tokenizer"} == {"ok"}, findings
