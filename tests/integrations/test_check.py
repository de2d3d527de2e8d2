"""`pronghorn check`: whole checkpoints pass, each fault is found by name, and what is refused is not loaded."""

import contextlib
import json
import os
import pickle
import re
import shutil
import socket

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.integrations.checked import NAME, change_json, found, states
from tests.models import tiny_model
from tests.plugins.conftest import letters  # noqa: F401 - a fixture
from typer.testing import CliRunner

import pronghorn.cli.check as room
import pronghorn.transformers.checking as loading
from pronghorn.checkpoint import Checkpoint
from pronghorn.checkpoint.source import SourceError
from pronghorn.cli import app
from pronghorn.cli.check import check, verdict
from pronghorn.methods import entry_points
from pronghorn.transformers.answers import NotFiniteError

WHOLE = "model.safetensors"


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture
def single(tmp_path):
    """Another, in one file."""
    tiny_model("llama").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def moved(folder):
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    return {**places, next(name for name, place in places.items() if place == NAME): "model-00001-of-00002.safetensors"}


def edit(folder, name, old, new):
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def spoil(tensors, number=float("nan")):
    next(iter(tensors.values())).view(-1)[3] = number


def listen(path):
    """A socket in the file system; its path is short, as theirs must be."""
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


KERNEL = '"_attn_implementation": "kernels-community/flash-attn2"'
INDEX = "model.safetensors.index.json"
REFUSED = {
    "pickle": ("no pickles", "evil.bin", lambda f: (f / "evil.bin").write_bytes(b"x")),
    "code": ("no code", "modeling_evil.py", lambda f: (f / "modeling_evil.py").write_text("raise SystemExit")),
    "code in a folder": ("no code", "a/b.so", lambda f: ((f / "a").mkdir(), (f / "a/b.so").write_bytes(b"ELF"))),
    "link out": ("no links out", "leak.txt", lambda f: (f / "leak.txt").symlink_to("/etc/hostname")),
    "link to a folder": ("no links out", "up", lambda f: (f / "up").symlink_to(f.parent)),
    "LFS": ("whole files", "Git LFS", lambda f: (f / NAME).write_text("version https://git-lfs.github.com/spec/v1\n")),
    "HTML": ("whole files", "web page", lambda f: (f / "config.json").write_text("<!DOCTYPE html><p>404</p>")),
    "empty": ("whole files", "empty", lambda f: (f / NAME).write_bytes(b"")),
    "truncated": ("safetensors", NAME, lambda f: cut(f / NAME)),
    "NaN in JSON": ("JSON", "NaN", lambda f: edit(f, "config.json", '"vocab_size": 128', '"vocab_size": NaN')),
    "key twice": ("JSON", "twice", lambda f: edit(f, "config.json", "{", '{"vocab_size": 7,')),
    "nested": ("JSON", "too deep", lambda f: (f / "extra.json").write_text("[" * 10**5 + "]" * 10**5)),
    "auto_map": ("names code", "auto_map", lambda f: change_json(f / "config.json", auto_map={"AutoModel": "evil.E"})),
    "hub kernel": ("names code", "config.json: _attn_impl", lambda f: edit(f, "config.json", "{", f"{{{KERNEL},")),
    "hub kernel inside": ("names code", "attn_impl", lambda f: edit(f, "config.json", "{", f'{{"a": [{{{KERNEL}}}],')),
    "pipe": ("whole files", "a pipe", lambda f: os.mkfifo(f / "notes.txt")),
    "pipe of JSON": ("whole files", "a pipe", lambda f: os.mkfifo(f / "extra.json")),
    "socket": ("whole files", "socket", lambda f: listen(f / "s")),
    "path in the index": ("index", "../x", lambda f: change_json(f / INDEX, weight_map={"a": "../x.safetensors"})),
    "missing shard": ("index", NAME, lambda f: (f / NAME).unlink()),
    "moved tensor": ("index", "the index says", lambda f: change_json(f / INDEX, weight_map=moved(f))),
    "many layers": ("sizes", "num_hidden_layers", lambda f: change_json(f / "config.json", num_hidden_layers=10**9)),
    "many labels": ("sizes", "num_labels", lambda f: change_json(f / "config.json", num_labels=3_000_000)),
    "large head": ("sizes", "head_dim", lambda f: change_json(f / "config.json", head_dim=500_000)),
    "many experts": ("sizes", "num_local_experts", lambda f: change_json(f / "config.json", num_local_experts=10**8)),
    "inside": ("sizes", "d_model", lambda f: change_json(f / "config.json", audio={"parts": [{"d_model": 10**9}]})),
    "layers a block": ("sizes", "layers_per", lambda f: change_json(f / "config.json", layers_per_block=10**7)),
    "channels": ("sizes", "block_out", lambda f: change_json(f / "config.json", block_out_channels=[8, 10**9])),
    "timesteps": ("sizes", "timesteps", lambda f: (f / "scheduler_config.json").write_text('{"timesteps": 1e12}')),
    "large vocabulary": ("sizes", "vocab_size", lambda f: change_json(f / "config.json", vocab_size=10**12)),
    "NaN": ("finite", "holds NaN", lambda f: change_tensors(f / NAME, spoil)),
    "no configuration": ("configuration", "no config.json", lambda f: (f / "config.json").unlink()),
    "no weights": ("safetensors", "none", lambda f: [path.unlink() for path in f.glob("*.safetensors")]),
}  # fmt: skip


def test_a_whole_checkpoint_passes(whole):
    findings = found(whole, source=str(whole))
    assert states({name: one for name, one in findings.items() if name != "tokenizer"}) == {"ok"}
    assert findings["tokenizer"].state == "skipped"
    assert "top-1 agreement 1.0000, KL 0.00000" in findings["as the source"].detail


@pytest.mark.timeout(60)
@pytest.mark.fault(1, 2, 3)
@pytest.mark.parametrize("fault", REFUSED)
def test_refused_before_anything_is_loaded(copy, monkeypatch, fault):
    loads = []
    monkeypatch.setattr(room, "_room", lambda ecosystem: loads.append(ecosystem))
    name, detail, inject = REFUSED[fault]
    assert states(found(copy)) == {"ok", "failed"}  # without a fault only our stand-in for the loader fails
    assert loads.pop() == "transformers"
    inject(copy)
    findings = found(copy)
    failed = [one for one in findings.values() if one.state == "failed"]
    assert [name in one.name for one in failed].count(True), failed
    assert any(detail in one.detail and one.remedy for one in failed), failed
    assert findings["loading in transformers"].state == "skipped"
    assert loads == []


@pytest.mark.fault(3)
def test_nothing_runs_what_a_checkpoint_brings(copy, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    payload = pickle.dumps(Evil())
    pickle.loads(payload)  # noqa: S301 - it works
    canary.rmdir()
    (copy / "pytorch_model.bin").write_bytes(payload)
    (copy / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    change_json(copy / "config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    assert found(copy)["no pickles"].state == "failed"
    assert not canary.exists()


def changes_tensors(change):
    return lambda folder: change_tensors(folder / WHOLE, change)


LOADED = {
    "missing key": ("lm_head.weight: missing", changes_tensors(lambda t: t.pop("lm_head.weight"))),
    "extra key": ("extra: the model has no place", changes_tensors(lambda t: t.update(extra=torch.ones(2)))),
    "renamed key": ("head: the model has no place", changes_tensors(lambda t: t.update(head=t.pop("lm_head.weight")))),
    "shape": ("(96, 64), the configuration means (80, 64)",
              lambda f: change_json(f / "config.json", intermediate_size=80)),
    "unknown architecture": ("wanted a class", lambda f: change_json(f / "config.json", architectures=["Evil"])),
    "special token": ("eos_token_id: got 500", lambda f: change_json(f / "generation_config.json", eos_token_id=500)),
    "overflow": ("NaN or Inf", changes_tensors(lambda t: t["lm_head.weight"].fill_(3e38))),
}  # fmt: skip


@pytest.mark.fault(2, 6)
@pytest.mark.parametrize("fault", LOADED)
def test_what_shows_when_it_is_loaded(single, fault):
    assert "failed" not in states(found(single))
    detail, inject = LOADED[fault]
    inject(single)
    failed = [one for one in found(single).values() if one.state == "failed"]
    assert len(failed) == 1
    assert detail in failed[0].detail
    assert failed[0].remedy


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_encoder_decoders_answer(tmp_path, kind):
    torch.manual_seed(0)
    sizes = {"T5": {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
             "Bart": {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
                      "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "max_position_embeddings": 64}}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=128, d_model=32, **sizes[kind])
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    findings = found(tmp_path, source=str(tmp_path))
    assert "failed" not in states(findings), findings
    assert findings["answers"].detail.startswith("finite, generated ids [")
    assert findings["the same again"].detail != "0 tokens"
    assert "top-1 agreement 1.0000" in findings["as the source"].detail


@pytest.mark.parametrize(("error", "named"), [(ValueError("input_ids are odd"), False), (NotFiniteError("Inf"), True)])
def test_an_overflow_alone_is_called_one(single, monkeypatch, error, named):
    def observe(model, ids):
        raise error

    monkeypatch.setattr(loading, "observe", observe)
    (failed,) = [one for one in found(single).values() if one.state == "failed"]
    assert str(error) in failed.detail
    assert ("float32" in failed.remedy) == named


def test_a_tokenizer_of_another_model(whole, tmp_path, letters):  # noqa: F811
    folder = shutil.copytree(whole, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(letters / name, folder / name)
    assert found(folder)["tokenizer"].state == "ok"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {f"word{i}": 95 + i for i in range(1, 100)}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "ids, the model's vocabulary 128" in found(folder)["tokenizer"].detail


def test_another_model_than_the_source(whole, tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    findings = found(whole, source=str(tmp_path / "other"))
    assert findings["as the source"].state == "failed"
    assert "top-1 agreement 0.0" in findings["as the source"].detail
    assert found(whole, source=str(tmp_path / "other"), min_agreement=0.0)["as the source"].state == "ok"


SOURCES = {
    "nowhere": lambda whole, folder: "nowhere/none",
    "empty": lambda whole, folder: folder,
    "damaged": lambda whole, folder: (shutil.copytree(whole, folder, dirs_exist_ok=True), cut(folder / NAME))[0],
    "another class": lambda whole, folder: (
        shutil.copytree(whole, folder, dirs_exist_ok=True),
        change_json(folder / "config.json", architectures=["Evil"]),
    )[0],
}


def in_transformers(folder, source):
    return loading.check(Checkpoint(folder, "transformers"), source, 0.5, lambda model: ())


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_is_none_is_no_fault_of_the_checkpoint(whole, tmp_path, monkeypatch, kind):
    assert states({one.name: one for one in in_transformers(whole, str(whole))}) == {"ok", "skipped"}
    source = str(SOURCES[kind](whole, tmp_path))
    if kind in ("nowhere", "empty"):
        monkeypatch.setattr(loading, "load_whole", None)  # nothing is loaded before
    with pytest.raises(SourceError, match=f"^--source: .*{re.escape(source)}"):
        list(in_transformers(whole, source))
    with pytest.raises(SourceError, match=r"^--source: "):  # no finding on the folder
        list(check(whole, "transformers", source))


def test_a_source_by_its_hub_name(whole, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(name) or str(whole))
    assert found(whole, source="org/base")["as the source"].state == "ok"
    assert asked == ["org/base"]


def test_the_command_says_it_in_json_and_by_its_exit_code(whole, copy):
    done = CliRunner().invoke(app, ["check", str(whole), "--for", "transformers", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["passed"]
    assert {"name", "state", "detail", "remedy", "needed"} == set(report["checks"][0])
    cut(copy / NAME)
    done = CliRunner().invoke(app, ["check", str(copy), "--for", "transformers"])
    assert done.exit_code == 1
    assert "must not be shipped" in done.stdout
    for arguments, named in (
        ([str(whole), "--for", "jax"], "--for: got 'jax'"),
        ([str(whole / "nowhere"), "--for", "vllm"], "nowhere"),
        ([str(whole), "--for", "vllm", "--min-agreement", "2"], "--min-agreement: got 2"),
    ):
        done = CliRunner().invoke(app, ["check", *arguments])
        assert done.exit_code == 1
        assert named in str(done.exception)


@pytest.fixture
def classifier(tmp_path):
    """A model that is asked nothing here, since it goes on with no text."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=128, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_what_answers_nothing_is_not_proved(classifier):
    findings = found(classifier)
    assert findings["answers"].state == "skipped"
    assert "as the source" not in findings
    assert verdict(findings.values()).startswith("not proved here: answers (BertForSequenceClassification does not")
    done = CliRunner().invoke(app, ["check", str(classifier), "--for", "transformers", "--source", str(classifier)])
    assert done.exit_code == 1
    assert "can be shipped" not in done.stdout
    assert re.search(r"not proved here: answers .*, as the source \(there are no answers to compare", done.stdout)
    done = CliRunner().invoke(app, ["check", str(classifier), "--for", "transformers", "--json"])
    report = json.loads(done.stdout)
    assert (done.exit_code, report["passed"]) == (1, False)
    assert report["verdict"].startswith("not proved here: answers")


def test_a_source_is_named_where_the_checkpoint_is_refused(copy, whole):
    cut(copy / NAME)
    findings = found(copy, source=str(whole))
    assert findings["as the source"].state == "skipped"
    assert verdict(findings.values()) == "must not be shipped as it is"


SHORTAGES = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "torch on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "Python": MemoryError("not so much"),
    "library": ModuleNotFoundError("No module named 'optimum'"),
}


@pytest.mark.parametrize("kind", SHORTAGES)
def test_what_this_machine_lacks_is_no_fault_of_the_checkpoint(whole, monkeypatch, kind):
    def load(*given):
        raise SHORTAGES[kind]

    monkeypatch.setattr(loading, "load_whole", load)
    findings = found(whole)
    assert "failed" not in states(findings)
    assert str(SHORTAGES[kind]) in findings["transformers"].detail
    assert "users" not in findings["transformers"].remedy
    assert verdict(findings.values()).startswith("not proved here: transformers (")


def test_without_the_library_nothing_is_proved(whole, monkeypatch):
    monkeypatch.setattr(room, "obstacle", lambda ecosystem: f"pronghorn needs {ecosystem} >=1, it is not installed")
    monkeypatch.setattr(room, "_room", None)  # nothing is loaded
    findings = list(check(whole, "transformers"))
    assert "failed" not in {one.state for one in findings}
    assert verdict(findings) == "not proved here: transformers (pronghorn needs transformers >=1, it is not installed)"
    assert "pip install" in findings[-2].remedy


def test_findings_are_kept_when_the_source_fails(whole, tmp_path):
    source = SOURCES["another class"](whole, tmp_path)
    command = ["check", str(whole), "--for", "transformers", "--source", str(source)]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 1
    assert isinstance(done.exception, SourceError)
    report = json.loads(done.stdout)
    kept = {one["name"]: one["state"] for one in report["checks"]}
    assert kept["answers"] == "ok"
    assert kept["as the source"] == "skipped"
    assert report["verdict"].startswith("not proved here: as the source (--source: ")
    done = CliRunner().invoke(app, command)
    assert "the same again" in done.stdout
    assert isinstance(done.exception, SourceError)


@pytest.mark.fault(17)
def test_a_broken_method_does_not_keep_others_from_being_checked(whole, monkeypatch):
    class Broken:
        name = "badluck"

        def load(self):
            raise ModuleNotFoundError("no module badluck_plugin")

    monkeypatch.setattr(room, "entry_points", lambda group: [Broken(), *entry_points(group)])
    findings = found(whole)
    assert "failed" not in states(findings)
    assert findings["badluck"].state == "skipped"
    assert "ModuleNotFoundError" in findings["badluck"].detail


def test_the_hubs_cache_is_no_link_out_of_the_folder(whole, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in whole.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert found(snapshot)["no links out of the folder"].state == "ok"


def test_what_hf_download_notes_beside_a_checkpoint_may_be_empty(copy):
    from huggingface_hub._local_folder import write_download_metadata

    notes = copy / ".cache/huggingface"
    write_download_metadata(copy, "config.json", "0" * 40, "1" * 40)
    lock = notes / "download/config.json.lock"
    lock.touch()  # newer versions of the library remove it
    assert states(found(copy)) == {"ok", "skipped"}
    for name, inject in (
        ("no pickles", lambda: (notes / "evil.bin").write_bytes(b"x")),
        ("no code", lambda: (notes / "evil.py").touch()),
        ("no links out of the folder", lambda: (notes / "leak").symlink_to("/etc/hostname")),
        ("whole files", lambda: (copy / ".cache/config.json.lock").touch()),
    ):
        inject()
        assert found(copy)[name].state == "failed"
