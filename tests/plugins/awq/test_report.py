"""The report and model card beside what AWQ quantized: true figures, the source's licence, and off to the Hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq.cli import app
from pronghorn.awq.config import AwqConfig
from pronghorn.awq.convert import convert_checkpoint
from pronghorn.awq.evaluate import perplexity
from pronghorn.awq.layers import AwqLinear
from pronghorn.awq.report import report_estimate, write_conversion_report
from pronghorn.cli.check import check
from pronghorn.transformers.answers import windows
from pronghorn.transformers.calibration_data import builtin_text

CARD = """---
license: other
license_name: letters-licence
language: en
pipeline_tag: text-generation
model_name: something else
---

# Letters
"""
HOW = ["--rtn", "--group-size", "32", "--device", "cpu"]


def call(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def source(letters, tmp_path_factory):
    folder = shutil.copytree(letters, tmp_path_factory.mktemp("sources") / "Letters-1M")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.txt").write_text("do as you like\n")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "Letters-AWQ"
    assert "model card in" in call("quantize", source, out, *HOW)
    return out


def test_an_estimate_asks_a_packed_block_and_leaves_the_model_as_it_was(source, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(source)
    before, called = dict(model.named_modules()), set()
    forward = AwqLinear.forward
    monkeypatch.setattr(AwqLinear, "forward", lambda layer, x: (called.add(layer), forward(layer, x))[1])
    tokenizer = AutoTokenizer.from_pretrained(source)
    report_estimate(model, tokenizer, str(source), AwqConfig(bits=4, group_size=32))
    linears = [part for part in before["model.layers.0"].modules() if isinstance(part, torch.nn.Linear)]
    assert len(called) == len(linears)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())


def test_figures_are_those_of_the_saved_checkpoint(made, source):
    report = json.loads((made / "quality.json").read_text())
    model, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (made, source))
    tokenizer = AutoTokenizer.from_pretrained(made)
    equal, divergence, tokens = 0, 0.0, 0
    with torch.no_grad():
        ids = windows(tokenizer, 128, longest=128)
        for part in ids:
            ours, before = (m(part).logits[0].double().log_softmax(-1) for m in (model, theirs))
            equal += int((ours.argmax(-1) == before.argmax(-1)).sum())
            divergence += float((before.exp() * (before - ours)).sum())
            tokens += len(ours)
        states = [m(ids[0], output_hidden_states=True).hidden_states for m in (model, theirs)]
    figures = report["figures"]
    assert figures["tokens"] == tokens
    assert figures["top-1 agreement"] == equal / tokens
    assert figures["KL divergence, nats a token"] == pytest.approx(divergence / tokens, rel=1e-4)
    error = (states[0][1] - states[1][1]).norm() / states[1][1].norm()
    assert figures["layers"]["model.layers.0"] == pytest.approx(float(error), rel=1e-4)
    assert len(figures["layers"]) == 2
    how = {"window": 128, "max_windows": 2, "progress": False}
    found = perplexity(model, tokenizer, builtin_text("evaluation"), **how).perplexity
    assert figures["perplexity"] == pytest.approx(found, rel=1e-5)
    assert 0 < report["seconds"] < 60


def test_the_report_says_where_its_figures_come_from(made):
    report = json.loads((made / "quality.json").read_text())
    assert report["recipe"]["search"] == {"method": "rtn"}
    assert report["recipe"]["group_size"] == 32
    for name in ("pronghorn", "torch", "transformers"):
        assert report["provenance"]["versions"][name]
    assert len(report["provenance"]["commit"]) == 40
    assert report["provenance"]["date"].startswith("20")


def test_the_card_has_the_hubs_header_and_the_sources_licence(made, source):
    text = (made / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header == {
        "base_model": "Letters-1M", "library_name": "transformers", "tags": ["awq", "quantized", "4-bit", "pronghorn"],
        "license": "other", "license_name": "letters-licence", "language": "en", "pipeline_tag": "text-generation",
    }  # fmt: skip
    huggingface_hub.ModelCard(text)  # the Hub's own reader
    assert (made / "LICENSE.txt").read_text() == "do as you like\n"
    assert "The source goes on" in text
    assert 'from_pretrained("Letters-AWQ")' in text
    for path in (source, source.parent, made.parent):  # paths of this machine are nobody's business
        assert str(path) not in text + (made / "quality.json").read_text()


def test_the_sources_hub_name_and_no_report(source, tmp_path, monkeypatch):
    call("quantize", source, tmp_path / "named", *HOW, "--base-model", "someone/letters")
    assert "base_model: someone/letters" in (tmp_path / "named/README.md").read_text()
    call("quantize", source, tmp_path / "bare", *HOW, "--no-report")
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert not names & {"README.md", "quality.json"}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("named", "bare"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_source_without_a_card(letters, tmp_path, caplog):
    call("quantize", letters, tmp_path / "out", *HOW)
    assert "license" not in yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])


@pytest.mark.fault(6)
def test_a_model_that_answers_nan_is_told_and_nothing_is_claimed(source, tmp_path, monkeypatch):
    """The checkpoint is there; a report of it is not."""
    import pronghorn.awq.quantize as room

    quantize, calls = room.quantize_model, []

    def damaging(model, *arguments, **options):
        done = quantize(model, *arguments, **options)
        calls.append(model.model.layers[0].mlp.down_proj.scales.fill_(float("inf")))
        return done

    monkeypatch.setattr(room, "quantize_model", damaging)
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), *HOW])
    assert len(calls) == 1
    assert isinstance(done.exception, ValueError)
    assert "NaN" in str(done.exception)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert not (tmp_path / "out/README.md").exists()


@pytest.mark.fault(1)
def test_a_flipped_bit_is_found_by_the_seal(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    assert {one.name: one.state for one in check(folder, "transformers")}["digests"] == "ok"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 4  # another number, and no other check could tell
    (folder / "model.safetensors").write_bytes(content)
    findings = {one.name: one for one in check(folder, "transformers")}
    assert findings["digests"].state == "failed"
    assert "model.safetensors" in findings["digests"].detail
    assert {one.state for name, one in findings.items() if name not in ("digests", "loading in transformers")} == {"ok"}


class Hub:
    """What would reach the Hub, in place of its HTTP."""

    def __init__(self, monkeypatch, card=None):
        self.files, self.headers = {}, []

        def create_commit(api, repo_id, operations, **options):
            self.files |= {op.path_in_repo: content(op) for op in operations}
            url = f"https://huggingface.co/{repo_id}/commit/0123456789"
            return huggingface_hub.CommitInfo(url, "", "", "0123456789")

        def content(operation):
            with operation.as_file() as file:
                return file.read()

        def create_repo(api, repo_id, **options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def download(repo_id, name, **options):
            assert name == "README.md"
            return str(card)

        monkeypatch.setattr(HfApi, "_validate_yaml", lambda api, content, **options: self.headers.append(content))
        monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)  # its uploads are not Python's
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", download)


def test_the_folder_goes_to_the_hub_with_card_and_report(made, monkeypatch):
    """`hf upload` and `upload_folder`: what was checked is what is there."""
    hub = Hub(monkeypatch)
    HfApi().upload_folder(repo_id="someone/letters-awq", folder_path=made)
    assert hub.files == {path.name: path.read_bytes() for path in made.iterdir()}
    assert hub.headers == [(made / "README.md").read_text()]


def test_the_models_own_push_to_hub_keeps_the_card_that_is_there(made, monkeypatch):
    hub = Hub(monkeypatch, card=made / "README.md")
    model = AutoModelForCausalLM.from_pretrained(made)
    model.push_to_hub("someone/letters-awq")
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= hub.files.keys()
    assert yaml.safe_load(hub.files["README.md"].decode().split("---")[1])["base_model"] == "Letters-1M"
    assert "The source goes on" in hub.files["README.md"].decode()
    sent, saved = load(hub.files["model.safetensors"]), load_file(made / "model.safetensors")
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    assert json.loads(hub.files["config.json"])["quantization_config"]["quant_method"] == "awq"
    assert Path(made / "README.md").is_file()


@pytest.mark.parametrize("version", ["gemv", "natural"])
def test_what_is_converted_says_that_it_is_the_same(made, tmp_path, version):
    convert_checkpoint(made, tmp_path / "out", version, progress=False)
    said = write_conversion_report(made, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    count = report["figures"]["linears"]
    assert count > 0
    others = len([name for name in load_file(made / "model.safetensors") if name.split(".")[-1] in ("weight", "bias")])
    assert said == f"{count} of {count} linears and {others} of {others} other tensors equal bit for bit"
    assert report["figures"]["linears equal bit for bit"] == count
    assert report["figures"]["other tensors equal bit for bit"] == others > 0
    assert report["figures"]["perplexity"] == json.loads((made / "quality.json").read_text())["figures"]["perplexity"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"converted to {version}" in card
    assert 'from_pretrained("out")' in card


def test_what_is_converted_is_of_the_same_base_model(made, source, tmp_path):
    """As the source's card says, or the command; without a card the folder's name is all there is."""
    listed, merged, bare = (shutil.copytree(made, tmp_path / name) for name in ("listed", "merged", "bare"))
    (listed / "README.md").write_text("---\nbase_model: [org/letters]\n---\n")
    (merged / "README.md").write_text("---\nbase_model: [org/letters, org/numbers]\n---\n")
    (bare / "README.md").unlink()
    for folder, more, wanted in (
        (made, (), source.name), (made, ("--base-model", "someone/letters"), "someone/letters"),
        (listed, (), "org/letters"), (merged, (), "merged"), (bare, (), "bare"),
    ):  # fmt: skip
        out = tmp_path / f"{folder.name}-{len(more)}"
        call("convert", folder, out, "--to", "gemv", *more)
        card = (out / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == wanted
        assert f'from_pretrained("{out.name}")' in card


def test_what_differs_after_a_conversion_is_counted(made, tmp_path):
    convert_checkpoint(made, tmp_path / "out", "gemv", progress=False)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    for part in ("scales", "norm.weight"):
        name = next(name for name in tensors if name.endswith(part))
        tensors[name] = tensors[name] * 2
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "out" / "pronghorn.json").unlink()
    write_conversion_report(made, tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "quality.json").read_text())["figures"]
    for kind in ("linears", "other tensors"):
        assert figures[f"{kind} equal bit for bit"] == figures[kind] - 1
