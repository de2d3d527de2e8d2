"""The script: from the files of settings in `examples/`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.vcpo.records import read_run
from pronghorn.vcpo.trl.script import main

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "examples" / "vcpo").glob("*.yaml"))


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_trains_and_goes_on(file, tmp_path):
    words = [sys.executable, "-m", "pronghorn.vcpo.train", "--config", str(file.relative_to(ROOT)),
             "--output_dir", str(tmp_path), "--save_steps", "2"]  # fmt: skip
    for more in (["--max_steps", "2"], ["--max_steps", "4", "--resume", "true"]):
        run = subprocess.run([*words, *more], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
    assert read_run(tmp_path).steps["step"].tolist() == [0, 1, 2, 3]
    assert (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reward_funcs: got none"), (["--reward_funcs", "nowhere"], "reward_funcs: got 'nowhere'"),
        (["--reward_funcs", "json.nothing"], "reward_funcs: got 'json.nothing'"),
        (["--reward_funcs", "json.dumps"], "datasets: got none"),
        (["--reward_funcs", "rewards.txt:strokes"], "wanted a file that ends with .py"),
        (["--reward_funcs", str(ROOT / "examples/vcpo/rewards.py") + ":none"], "wanted package.module.function"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(words, message, tmp_path):
    model = str(ROOT / "examples" / "vcpo" / "model")
    base = ["--model_name_or_path", model, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false",
            "--from_scratch", "true"]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        main([*base, *words])
