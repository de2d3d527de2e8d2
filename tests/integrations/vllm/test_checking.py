"""`pronghorn check --for vllm`: an engine answers, as methods have it started; its own troubles are no fault."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from tests.integrations.checked import change_json, found, states
from tests.models import tiny_model

import pronghorn.cli.check as room
from pronghorn.cli.check import verdict

vllm = pytest.importorskip("vllm", reason="the vllm extra is not installed")  # as among the oldest libraries


def test_methods_say_how_vllm_serves_a_checkpoint(whole, tmp_path, monkeypatch):
    """Of several that do all is given to the engine, for the checkpoint and for its source each its own."""

    def method(name):
        return SimpleNamespace(
            check_files=lambda checkpoint: (),
            vllm_options=lambda checkpoint: {"seed": 1, "additional_config": {name: checkpoint.folder.name}},
        )

    import pronghorn.vllm.checking as serving

    served = []
    monkeypatch.setattr(room, "_methods", lambda: ({"a": method("a"), "b": method("b")}, []))
    monkeypatch.setattr(room, "_available", lambda ecosystem: ())
    answer = serving._Served([1], [1], [{1: 0.0}])
    monkeypatch.setattr(serving, "_serve", lambda *given: served.append(given) or answer)
    source = shutil.copytree(whole, tmp_path / "source")
    findings = found(whole, "vllm", source=str(source))
    assert findings["engine"].detail == "started with additional_config, seed"
    assert [(folder, options["additional_config"]) for folder, *_, options in served] == [
        (whole, {"a": whole.name, "b": whole.name}), (source, {"a": "source", "b": "source"})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RuntimeError("Engine core initialization failed. See root cause above."), "engine"),
        (Exception("EngineCore encountered an issue. See stack trace (above) for the root cause."), "engine"),
        (ValueError("No available memory for the cache blocks."), "vllm"),
        (ValueError("Free memory on device cuda:0 (2/80 GiB) on startup is less than desired."), "vllm"),
    ],
)
def test_an_engine_without_memory_is_no_fault_of_the_checkpoint(whole, monkeypatch, error, name):
    def start(*given, **options):
        raise error

    monkeypatch.setattr(vllm, "LLM", start)
    findings = found(whole, "vllm", source=str(whole))
    assert "failed" not in states(findings)
    assert findings["as the source"].state == "skipped"
    assert verdict(findings.values()).startswith(f"not proved here: {name} (")


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllms_engine_is_asked(whole, tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(folder)
    findings = found(folder, "vllm", source=str(folder))
    assert states({name: one for name, one in findings.items() if name != "tokenizer"}) == {"ok"}, findings
    assert "top-1 agreement 1.0000, KL 0.00000" in findings["as the source"].detail
    change_json(folder / "config.json", intermediate_size=80)
    assert "the configuration means (80, 128)" in found(folder, "vllm")["keys and shapes"].detail
    # vLLM's attention on a CPU has no heads of 16: a checkpoint that transformers takes, and no user could serve.
    assert found(whole, "transformers")["answers"].state == "ok"
    if torch.cuda.is_available():
        return
    assert "head_dim=16" in found(whole, "vllm")["vllm"].detail
