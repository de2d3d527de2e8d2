"""What a reader pastes: quick starts run from top to bottom; elsewhere imports and options are those there are."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from tests.models import tiny_model
from tests.plugins.pairs.test_models import save_sana, tokenizer
from tests.plugins.pairs.test_serving import SIZES
from typer.testing import CliRunner

import pronghorn.cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|sh|bash)\b[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODEL, PIPELINE = "HuggingFaceTB/SmolLM2-135M-Instruct", "Efficient-Large-Model/Sana_600M_512px_diffusers"
RUN = ("pronghorn duoattention find", "pronghorn vcpo report", "pronghorn verify", "pronghorn info")


def blocks(page):
    """Kind and text of each block of code."""
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


def commands(text):
    """The lines of a shell, those that go on joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Small things under the names that pages download by, and a shorter search."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_model("llama", **SIZES).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    save_sana(folder / "pipeline")
    search = {"n_samples=16, seq_len=256": "n_samples=2, seq_len=64"}
    return {MODEL: str(folder / "model"), PIPELINE: str(folder / "pipeline"), **search}


def paste(page, stand_ins):
    """Run a page's blocks in the current folder; returns what they named."""
    names = {"__name__": "__main__"}
    for kind, text in blocks(page):
        for name, there in stand_ins.items():
            text = text.replace(name, there)
        if kind == "python":
            exec(compile(text, page.name, "exec"), names)  # noqa: S102 - our own pages
            continue
        for line in commands(text):
            if line.startswith(RUN):
                done = CliRunner().invoke(pronghorn.cli.app, shlex.split(line)[1:])
                assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"
    return names


@pytest.mark.parametrize("name", ["transformers", "diffusers", "trl", "lerobot", "torch"])
def test_a_quick_start_runs(name, stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = paste(ROOT / f"docs/ecosystems/{name}.md", stand_ins)
    said = capsys.readouterr().out
    if name == "transformers":
        assert len(said.splitlines()) >= 2
        assert (tmp_path / "smollm2-awq" / "model.safetensors").exists()
        assert sum(map(sum, names["duo"].full_heads)) == 2  # of four heads
    if name == "diffusers":
        assert (tmp_path / "pronghorn.png").exists()
        assert (tmp_path / "sana-awq" / "model_index.json").exists()
    if name == "trl":
        assert names["trainer"].state.global_step == 2
        assert list((tmp_path / "vcpo-run").glob("*.png"))
    if name == "lerobot":
        assert names["runner"].statistics().commands == 100
    if name == "torch":
        assert "torch.Size" in said


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_the_quick_start_of_vllm_runs(stand_ins, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    monkeypatch.chdir(tmp_path)
    (first, *_) = [text for kind, text in blocks(ROOT / "docs/ecosystems/transformers.md") if kind == "python"]
    for name, there in stand_ins.items():
        first = first.replace(name, there)
    exec(compile(first, "transformers.md", "exec"), {})  # noqa: S102 - our own pages
    quick = {"max_model_len=512": 'max_model_len=512, dtype="float32", enforce_eager=True'}  # compiling takes minutes
    names = paste(ROOT / "docs/ecosystems/vllm.md", {**stand_ins, **quick})
    assert len(names["answers"][0].outputs[0].token_ids) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_imports_what_is_there(page):
    for kind, text in blocks(page):
        if kind == "python" and "toyscale" not in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("pronghorn"):
                    assert {name.name for name in node.names} <= names_in(node.module), node.module


def names_in(module):
    """What can be imported of a module; of a room whose library is elsewhere, what its source defines."""
    if ".lerobot" not in module:
        loaded = importlib.import_module(module)
        return {*dir(loaded), *getattr(loaded, "__all__", ())}
    source = (ROOT / "plugins" / Path(*module.split("."))).with_suffix(".py").read_text()
    return {node.name for node in ast.parse(source).body if hasattr(node, "name")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_are_there(page):
    for kind, text in blocks(page):
        for line in commands(text) if kind != "python" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["pronghorn"] and words[1] != "toyscale":
                command, rest = found(words[1:])
                known = {option for part in command.params for option in (*part.opts, *part.secondary_opts)}
                asked = {word.split("=")[0] for word in rest if word.startswith("--")}
                assert asked <= known, line


def found(words):
    """The command that words name, and the words after it."""
    command = typer.main.get_command(pronghorn.cli.app)
    while hasattr(command, "list_commands"):
        name, *words = words
        command = command.get_command(None, name)
        assert command is not None, name
    return command, words
