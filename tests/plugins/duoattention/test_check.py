"""What DuoAttention says of checkpoints to `pronghorn check`, and the report beside what `apply` saves."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pronghorn.checkpoint import Checkpoint
from pronghorn.cli.check import check
from pronghorn.duoattention import DuoAttentionConfig, apply_duo
from pronghorn.duoattention.check import vllm_options
from pronghorn.duoattention.cli import app
from pronghorn.duoattention.pattern import GATES, Pattern, save_pattern
from pronghorn.files.sealed import INDEX

SIZES = ["--sink", "2", "--recent", "8"]


@pytest.fixture(scope="session")
def applied(letters, tmp_path_factory):
    """The tiny model with a pattern, and its report."""
    root = tmp_path_factory.mktemp("applied")
    save_pattern(Pattern([[1.0, 0.0], [0.0, 1.0]]), root / "pattern")
    done = CliRunner().invoke(
        app, ["apply", str(letters), str(root / "pattern"), str(root / "model"), *SIZES], catch_exceptions=False
    )
    assert "model card in" in done.output
    return root / "model"


def found(folder, **options):
    return {one.name: one for one in check(folder, "transformers", **options)}


def test_a_model_with_its_pattern_passes(applied, letters):
    findings = found(applied, source=str(letters))
    assert {one.state for one in findings.values()} == {"ok"}
    assert "2 of 4" in findings["DuoAttention gates"].detail
    assert "top-1 agreement 1.0000" in findings["as the source"].detail  # without the cache it is the model it was


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: save_pattern(Pattern([[1.0, 0.0]]), folder), "for 1 layers of 2"),
        (lambda folder: save_pattern(Pattern([[1.0], [0.0]]), folder), "for 2 layers of 1"),
        (lambda folder: (folder / GATES).write_text("1.0\tnan\n0.0\t1.0\n"), "finite"),
        (lambda folder: (folder / GATES).write_text("one\ttwo\n"), "line 1"),
        (lambda folder: (folder / GATES).write_text("1.0\t1.0\n0.0\t1.0\n"), "damaged"),
    ],
)
def test_gates_of_another_model(applied, tmp_path, damage, named):
    folder = shutil.copytree(applied, tmp_path / "copy")
    (folder / INDEX).unlink()  # sealed, the digests alone would refuse it
    assert found(folder)["DuoAttention gates"].state == "ok"
    damage(folder / "duoattention")
    findings = found(folder)
    assert findings["DuoAttention gates"].state == "failed"
    assert named in findings["DuoAttention gates"].detail
    assert "loading in transformers" in findings


@pytest.mark.fault(1)
def test_a_model_without_its_pattern_is_not_shipped(applied, tmp_path):
    """Its heads are in another order, which only the pattern tells."""
    folder = shutil.copytree(applied, tmp_path / "copy")
    shutil.rmtree(folder / "duoattention")
    findings = found(folder)
    assert findings["digests"].state == "failed"
    assert "duoattention" in findings["digests"].detail


def test_the_reports_figures_are_those_of_the_cache(applied, letters):
    """Measured anew from the saved checkpoint, token by token."""
    report = json.loads((applied / "quality.json").read_text())
    assert report["recipe"]["sink_size"] == 2
    assert report["provenance"]["seed"] == 42
    assert report["figures"]["full key/value heads"] == 2
    model = AutoModelForCausalLM.from_pretrained(applied)
    source = AutoModelForCausalLM.from_pretrained(letters)
    tokenizer = AutoTokenizer.from_pretrained(applied)
    config = DuoAttentionConfig.from_pretrained(applied / "duoattention")
    duo = apply_duo(model, config)
    from pronghorn.transformers.answers import windows

    equal, divergence, tokens = 0, 0.0, 0
    for ids in windows(tokenizer, 128, longest=128, length=30):
        with torch.no_grad():
            cache = duo.make_cache()
            ours = torch.cat([model(part, past_key_values=cache).logits[0] for part in ids.split(4, 1)]).log_softmax(-1)
            theirs = source(ids).logits[0].log_softmax(-1)
        equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        tokens += len(ours)
    assert report["figures"]["tokens"] == tokens
    assert report["figures"]["top-1 agreement"] == pytest.approx(equal / tokens, abs=2e-3)
    assert report["figures"]["KL divergence, nats a token"] == pytest.approx(divergence / tokens, rel=1e-3)
    assert divergence > 0


def test_vllm_is_asked_for_the_models_class_and_its_gates(applied, letters):
    options = vllm_options(Checkpoint(applied, "vllm"))
    assert options["hf_overrides"] == {"architectures": ["DuoAttentionLlamaForCausalLM"]}
    settings = options["additional_config"]["duoattention"]
    saved = DuoAttentionConfig.from_pretrained(applied / "duoattention")
    assert (settings["gates"], settings["sink_size"], settings["recent_size"]) == (saved.gates, 2, 8)
    assert vllm_options(Checkpoint(letters, "vllm")) == {}


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_streaming_heads_serve_in_vllm(tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    from pronghorn.duoattention.vllm.backend import SinkWindowImpl

    served, forward = set(), SinkWindowImpl.forward

    def counted(self, layer, query, key, value, cache, metadata, *more, **options):
        if metadata is not None:  # None measures memory
            served.add((layer.layer_name, self.num_kv_heads, self.sink_size, self.window))
        return forward(self, layer, query, key, value, cache, metadata, *more, **options)

    monkeypatch.setattr(SinkWindowImpl, "forward", counted)
    source, folder = tmp_path / "source", tmp_path / "applied"
    tiny_model("llama", hidden_size=128, head_dim=32, max_position_embeddings=512).save_pretrained(source)
    shutil.copytree(source, folder)
    config = DuoAttentionConfig(gates=[[1.0, 0.0], [0.0, 1.0]], threshold=0.5, sink_size=2, recent_size=8, kv_bits=4)
    config.save_pretrained(folder / "duoattention")
    findings = {one.name: one for one in check(folder, "vllm", str(source), min_agreement=0.0)}
    assert {one.state for one in findings.values() if one.name != "tokenizer"} == {"ok"}, findings
    assert findings["engine"].detail == "started with additional_config, hf_overrides"
    assert served == {(f"model.layers.{layer}.self_attn.attn.streaming", 1, 2, 9) for layer in (0, 1)}
    top1 = float(re.search(r"agreement ([0-9.]+)", findings["as the source"].detail)[1])
    assert top1 < 1  # the source, which is no checkpoint of ours, is served with all its heads full


def test_no_report_and_the_same_weights(applied, letters, tmp_path):
    CliRunner().invoke(
        app, ["apply", str(letters), str(applied / "duoattention"), str(tmp_path / "x"), *SIZES, "--no-report"],
        catch_exceptions=False,
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == {path.name for path in applied.iterdir()} - {"README.md", "quality.json"}
    assert load_file(tmp_path / "x" / "model.safetensors").keys() == load_file(applied / "model.safetensors").keys()
