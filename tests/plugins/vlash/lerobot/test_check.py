"""`pronghorn check --for lerobot`: policies of LeRobot and of ours act before they are shipped."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.cli.check import check
from pronghorn.files.sealed import INDEX as SEAL


def found(folder, **options):
    return {one.name: one for one in check(folder, "lerobot", **options)}


def configure(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_a_trained_policy_passes(trained):
    findings = found(trained, source=str(trained))
    assert {one.state for one in findings.values()} == {"ok"}, findings
    assert findings["policy"].detail.startswith("vlash")
    assert "(16, 2), finite" in findings["VLASH chunk"].detail
    assert "3 finite actions of (2,)" in findings["acts"].detail
    assert "relative error 0.000000" in findings["as the source"].detail


def test_a_source_by_its_hub_name(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(name) or str(trained))
    assert found(trained, source="org/base")["as the source"].state == "ok"
    assert asked == ["org/base"]


def test_a_policy_of_lerobots_own(data, tmp_path):
    import tiny_lerobot
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.factory import make_policy

    meta = LeRobotDatasetMetadata("tiny/local", root=data)
    config = ACTConfig(device="cpu", chunk_size=8, n_action_steps=8, push_to_hub=False, **tiny_lerobot.ACT)
    policy = make_policy(config, ds_meta=meta)
    policy.save_pretrained(tmp_path)
    for processor in make_pre_post_processors(config, dataset_stats=meta.stats):
        processor.save_pretrained(tmp_path)
    findings = found(tmp_path)
    assert {one.state for one in findings.values()} == {"ok"}, findings
    assert findings["policy"].detail.startswith("act")


FAULTS = {
    "settings": ("VLASH settings", "n_action_steps",
                 lambda f: configure(f, "config.json", lambda c: c.update(n_action_steps=99))),
    "processors": ("VLASH processors", "base", lambda f: shutil.rmtree(f / "base")),
    "truncated": ("safetensors", "model.safetensors",
                  lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:4096])),
    "missing key": ("lerobot", "", lambda f: change(f, lambda t: t.pop(next(iter(t))))),
    "NaN": ("finite numbers", "NaN", lambda f: change(f, lambda t: next(iter(t.values())).fill_(float("nan")))),
}  # fmt: skip


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.fault(1, 2, 26)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(trained, tmp_path, fault):
    folder = shutil.copytree(trained, tmp_path / "copy")
    assert "failed" not in {one.state for one in found(folder).values()}
    name, detail, inject = FAULTS[fault]
    inject(folder)
    assert "failed" in {one.state for one in found(folder).values()}  # by the seal, if not before
    (folder / SEAL).unlink()  # as in checkpoints from elsewhere
    findings = found(folder)
    assert findings[name].state == "failed", findings
    assert detail in findings[name].detail


@pytest.mark.fault(3)
def test_a_processor_that_names_a_module_from_elsewhere(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    name = next(path.name for path in folder.glob("*processor*.json"))
    (folder / SEAL).unlink()
    configure(folder, name, lambda content: content["steps"].append({"class": "evil.Step", "config": {}}))
    assert "evil.Step" in found(folder)["processors"].detail


@pytest.mark.fault(26)
def test_actions_that_are_no_numbers(trained, monkeypatch):
    """Weights are finite, and what they compute is not."""
    from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy

    select = VLASHPolicy.select_action
    monkeypatch.setattr(VLASHPolicy, "select_action", lambda *given: select(*given) * torch.inf)
    assert "NaN or Inf" in found(trained)["acts"].detail
