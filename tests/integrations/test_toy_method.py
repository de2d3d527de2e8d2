"""The page "add your own method", followed to the letter: its files make a distribution that works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\w+ title=\"([^\"]+)\"\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The toy method, installed from the page's own files into a folder."""
    project = tmp_path_factory.mktemp("toyscale")
    blocks = BLOCK.findall((ROOT / "docs" / "add-a-method.md").read_text())
    assert {name for name, _ in blocks} >= {"pyproject.toml", "src/pronghorn/toyscale/__init__.py"}
    for name, content in blocks:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    target = tmp_path_factory.mktemp("site")
    command = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(project),
    ]
    subprocess.run([sys.executable, *command], check=True, timeout=300)
    return target


def run(site, *arguments):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    found = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)
    return found.returncode, found.stdout + found.stderr


COMMAND = ("-c", "from pronghorn.cli import main; main()")


def test_it_is_listed_beside_the_others(site):
    code, output = run(site, *COMMAND, "list")
    assert code == 0, output
    assert re.search(r"toyscale\s+│ yes", output)
    assert re.search(r"awq\s+│ yes", output)


def test_its_command_works(site):
    code, output = run(site, *COMMAND, "toyscale", "check", "2")
    assert code == 0
    assert "factor 2.0 is fine" in output
    code, output = run(site, *COMMAND, "toyscale", "check", "0")
    assert code == 1
    assert "Error: factor: got 0.0" in output


def test_it_is_registered(site):
    code, output = run(
        site,
        "-c",
        "import torch, transformers, pronghorn.transformers; from pronghorn.toyscale import ToyscaleConfig\n"
        "shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1)\n"
        "shape |= dict(num_attention_heads=2, vocab_size=16)\n"
        "model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))\n"
        "before = model.lm_head.weight.clone(); model.toyscale(ToyscaleConfig(2.0))\n"
        "assert torch.equal(model.lm_head.weight, 2 * before)",
    )
    assert code == 0, output
