"""The commands, as users type them, on a tiny model with a tokenizer of letters."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from pronghorn.duoattention import DuoAttentionConfig
from pronghorn.duoattention.cli import app
from pronghorn.files.sealed import check_seal

FAST = ["--dtype", "float32", "--device", "cpu"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pattern")
    DuoAttentionConfig(gates=[[0.9, 0.1], [0.2, 0.7]]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text("the quiet river runs by the old oak. " * 200)
    return path


@pytest.mark.parametrize("method", ["optimise", "on_the_fly"])
def test_find(letters, story, tmp_path, method):
    found = call(
        "find", letters, tmp_path / "out", "--method", method, "--text", story, "--steps", 2, "--sink", 4,
        "--recent", 8, "--block", 1, "--context-min", 200, "--context-max", 1000, "--passkeys", 1,
        "--passkey-length", 2, "--samples", 1, "--state", tmp_path / "state", "--force", *FAST,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "mean gate" in found.output
    assert len(DuoAttentionConfig.from_pattern(tmp_path / "out").gates) == 2
    assert (tmp_path / "out" / "gates.png").exists()


@pytest.mark.fault(8, 9)
def test_force_gives_nothing_up_before_the_work(letters, story, tmp_path):
    state = tmp_path / "state"
    how = [
        "--text", story, "--steps", 2, "--sink", 4, "--recent", 8, "--block", 1, "--context-min", 200,
        "--context-max", 1000, "--passkeys", 1, "--passkey-length", 2, "--state", state, *FAST,
    ]  # fmt: skip
    assert call("find", letters, tmp_path / "out", *how).exit_code == 0
    held = {path.name: path.read_bytes() for path in state.iterdir()}
    for model, changes in ((tmp_path / "nothing", ()), (tmp_path / "nothing", ["--dry-run"]),
                           (letters, ["--steps", 0]), (letters, ["--method", "guess"]),
                           (letters, ["--dense-branch", "both"])):  # fmt: skip
        found = call("find", model, tmp_path / "out", *how, "--force", *changes)
        assert isinstance(found.exception, (OSError, ValueError)), found.output
    found = call("find", letters, tmp_path / "out", *how, "--lr", 0.1, "--force", "--dry-run")
    assert "peak memory" in found.output, found.exception
    assert {path.name: path.read_bytes() for path in state.iterdir()} == held
    assert isinstance(call("find", letters, tmp_path / "out", *how, "--lr", 0.1).exception, ValueError)
    assert call("find", letters, tmp_path / "out", *how, "--lr", 0.1, "--force").exit_code == 0


@pytest.mark.slow
def test_processes_share_sequences(letters, story, tmp_path):
    options = ["--text", story, "--steps", 3, "--lr", 0.1, "--sink", 4, "--recent", 8, "--block", 1,
               "--context-min", 200, "--context-max", 1000, "--passkeys", 1, "--passkey-length", 2, *FAST,
               "--state", tmp_path / "state", "--force"]  # fmt: skip
    assert call("find", letters, tmp_path / "one", *options).exit_code == 0
    script = tmp_path / "find.py"
    script.write_text("from pronghorn.duoattention.cli import app; app()")
    # What `accelerate launch` runs on several GPUs; on CPUs it wants MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, script, "find", letters]
    subprocess.run([str(part) for part in (*launch, tmp_path / "two", *options)], check=True, timeout=300)
    one, two = (torch.tensor(DuoAttentionConfig.from_pattern(tmp_path / name).gates) for name in ("one", "two"))
    assert torch.allclose(one, two, atol=1e-6)


def test_apply_gives_the_same_model_in_another_order(letters, pattern, tmp_path):
    from transformers import AutoModelForCausalLM

    found = call("apply", letters, pattern, tmp_path / "duo", "--sink", 4, "--recent", 8, "--dtype", "float32")
    assert found.exit_code == 0, found.output
    assert "2 of 4" in found.output
    config = DuoAttentionConfig.from_pretrained(tmp_path / "duo" / "duoattention")
    assert config.full_heads() == [[True, False], [True, False]]
    assert check_seal(tmp_path / "duo")
    assert (config.sink_size, config.recent_size) == (4, 8)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (letters, tmp_path / "duo"))
    assert torch.allclose(before, after, atol=1e-5)
    assert isinstance(call("apply", letters, pattern, tmp_path / "duo").exception, FileExistsError)
    (tmp_path / "duo" / "duoattention" / "full_attention_heads.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="full_attention_heads"):
        check_seal(tmp_path / "duo")


def test_plan(letters, pattern):
    found = call("plan", letters, "--context", 1000, "--pattern", pattern, "--budget", 1)
    assert found.exit_code == 0, found.output
    assert "1000 tokens" in found.output
    assert "fit" in found.output
    assert "2.00 x" in call("plan", letters, "--context", 10**9, "--sparsity", 0.5).output


def test_bench(letters, pattern, tmp_path):
    found = call(
        "bench", letters, "--pattern", pattern, "--contexts", "60,100", "--chunk", 40, "--steps", 2, "--sink", 4,
        "--recent", 8, "--json", tmp_path / "bench.json", *FAST,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["cache"], row["context"]) for row in rows] == [
        ("dense", 60),
        ("dense", 100),
        ("duo", 60),
        ("duo", 100),
    ]
    of_token = 2 * 16 * 4  # keys and values of a head
    assert rows[1]["cache_bytes"] == 4 * 100 * of_token
    assert rows[3]["cache_bytes"] == (2 * 100 + 2 * 12) * of_token
    assert call("bench", letters, "--contexts", "8,many").exit_code == 2


def test_bench_needs_a_gpu_for_graphs(letters):
    found = call("bench", letters, "--graphs", *FAST)
    assert isinstance(found.exception, ValueError)
    assert "CUDA graphs need a GPU" in str(found.exception)


def test_niah(letters, pattern, story, tmp_path):
    arguments = ("niah", letters, "--out", tmp_path, "--pattern", pattern, "--lengths", "400,500,2", "--depths", 2,
                 "--text", story, "--sink", 4, "--recent", 8, "--chunk", 128, *FAST)  # fmt: skip
    found = call(*arguments)
    assert found.exit_code == 0, found.output
    assert "mean score" in found.output
    assert (tmp_path / "niah.png").exists()
    assert len(json.loads((tmp_path / "niah.json").read_text())["answers"]) == 4
    assert call(*arguments).output == found.output
    assert call(*arguments[:-6], "--sink", 5, *FAST).exception is not None


def test_longbench(letters, pattern, tmp_path):
    line = {"input": "Who?", "context": "the owl sleeps. " * 30, "answers": ["the owl"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(line) + "\n")
    found = call(
        "longbench", letters, tmp_path / "qasper.jsonl", "--out", tmp_path / "out", "--pattern", pattern, "--sink", 4,
        "--recent", 8, "--max-length", 200, "--chunk", 64, *FAST,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "qasper" in json.loads((tmp_path / "out" / "longbench.json").read_text())["scores"]
