"""The calibration runner: the right inputs for every block, resumable, and clear about bad data."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.models import CONFIGS, tiny_model, token_ids

from pronghorn.transformers.activation_store import ActivationStore
from pronghorn.transformers.calibration import BlockResult, CalibrationRunner
from pronghorn.transformers.calibration_data import builtin_text, calibration_samples
from pronghorn.transformers.decoder import find_decoder_blocks
from pronghorn.transformers.experts import unfuse_experts


def outputs(block, inputs):
    found = [block.module(hidden, **kwargs) for hidden, kwargs in inputs]
    found = [output if isinstance(output, torch.Tensor) else output[0] for output in found]
    return BlockResult({"out": torch.cat(found)}, {"block": block.name})


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_get_what_the_model_gives_them(family):
    model = tiny_model(family)
    samples = [token_ids(2, 24), token_ids(1, 17, seed=1)]
    seen = {}
    for block in find_decoder_blocks(model):
        block.module.register_forward_hook(
            lambda module, args, output, name=block.name: seen.setdefault(name, []).append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
    with torch.no_grad():
        for ids in samples:
            model(ids, use_cache=False)
    wanted = {name: list(values) for name, values in seen.items()}

    def check(block, inputs):
        got = [block.module(hidden, **kwargs) for hidden, kwargs in inputs]
        for ours, theirs in zip(got, wanted[block.name], strict=True):
            ours = ours if isinstance(ours, torch.Tensor) else ours[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        return BlockResult({})

    assert list(CalibrationRunner(model, samples, progress=False).run(check)) == list(wanted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_experts_apart_compute_the_same(family):
    model, ids = tiny_model(family), token_ids()
    with torch.no_grad():
        before = model(ids).logits
        names = unfuse_experts(model)
        after = model(ids).logits
    assert names
    assert not unfuse_experts(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_transformed_block_feeds_the_next():
    model, samples = tiny_model("llama"), [token_ids()]
    plain = CalibrationRunner(model, samples, progress=False).run(outputs)

    def zero(block, result):
        for parameter in block.module.parameters():
            parameter.data.zero_()

    changed = CalibrationRunner(model, samples, progress=False).run(outputs, zero)
    first, last = plain
    assert torch.equal(plain[first].tensors["out"], changed[first].tensors["out"])
    assert not torch.equal(plain[last].tensors["out"], changed[last].tensors["out"])


def test_activations_beyond_the_budget_go_to_disk(tmp_path):
    store = ActivationStore(100, tmp_path)
    tensors = [torch.randn(3, 5) for _ in range(4)]
    for tensor in tensors:
        store.append(tensor)
    assert len(list(tmp_path.iterdir())) == 3
    assert all(torch.equal(a, b) for a, b in zip(store, tensors, strict=True))
    store.clear()
    assert not list(tmp_path.iterdir())


def test_spilled_runs_give_the_same_bits(tmp_path):
    model, samples = tiny_model("llama"), [token_ids(seed=s) for s in range(3)]
    kept = CalibrationRunner(model, samples, progress=False).run(outputs)
    spilled = CalibrationRunner(model, samples, progress=False, activation_budget=0, state_dir=tmp_path).run(outputs)
    assert all(torch.equal(kept[name].tensors["out"], spilled[name].tensors["out"]) for name in kept)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_smaller_chunk_after_running_out_of_memory():
    model, samples = tiny_model("llama"), [token_ids(8)]
    tried = []

    def hungry(block, inputs):
        sizes = [hidden.shape[0] for hidden, _ in inputs]
        tried.append(max(sizes))
        if max(sizes) > 2:
            raise torch.OutOfMemoryError("full")
        return outputs(block, inputs)

    result = CalibrationRunner(model, samples, progress=False).run(hungry)
    assert tried == [8, 4, 2, 8, 4, 2]
    wanted = CalibrationRunner(model, samples, progress=False).run(outputs)
    for name in wanted:
        torch.testing.assert_close(result[name].tensors["out"], wanted[name].tensors["out"])

    def starving(block, inputs):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="does not fit"):
        CalibrationRunner(model, samples, progress=False).run(starving)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from pronghorn.transformers.calibration import CalibrationRunner
    from tests.integrations.transformers.test_calibration import outputs
    from tests.models import tiny_model, token_ids

    model = tiny_model("llama", num_hidden_layers=4)
    calls = []

    def search(block, inputs):
        calls.append(block.name)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return outputs(block, inputs)

    results = CalibrationRunner(model, [token_ids()], state_dir=Path(sys.argv[1]), progress=False).run(search)
    torch.save({name: result.tensors["out"] for name, result in results.items()}, sys.argv[3])
    print(len(calls))
"""


def run_killed(state, kill_at, out):
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(state), str(kill_at), str(out)]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, env=env)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    whole = run_killed(tmp_path / "a", 0, tmp_path / "a.pt")
    assert whole.returncode == 0, whole.stderr
    killed = run_killed(tmp_path / "b", 3, tmp_path / "b.pt")
    assert killed.returncode == -signal.SIGKILL
    resumed = run_killed(tmp_path / "b", 0, tmp_path / "b.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == "2"  # two of four blocks were done
    a, b = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_run_is_not_continued(tmp_path):
    model, samples = tiny_model("llama"), [token_ids()]
    first = CalibrationRunner(model, samples, state_dir=tmp_path, fingerprint={"bits": 4}, progress=False)
    first.run(outputs)
    for changes, field in (
        ({"fingerprint": {"bits": 3}}, "bits"),
        ({"samples": [token_ids(seed=5)]}, "data"),
        ({"model": tiny_model("llama", seed=1)}, "weights"),
    ):
        how = {"model": model, "samples": samples, "fingerprint": {"bits": 4}, **changes}
        with pytest.raises(ValueError, match=field):
            CalibrationRunner(how.pop("model"), how.pop("samples"), state_dir=tmp_path, progress=False, **how).run(
                outputs
            )
    (tmp_path / "fingerprint.json").write_text(json.dumps({"weights": 0}))
    with pytest.raises(ValueError, match="these differ"):
        first.run(outputs)


def test_bad_numbers_are_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        CalibrationRunner(model, [token_ids()], progress=False).run(outputs)
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3e38)
    with pytest.raises(ValueError, match=r"sample 0.*layers\.0.*NaN or Inf"):
        CalibrationRunner(model, [token_ids()], progress=False).run(outputs)


def test_a_full_disk_is_said_before_the_start(tmp_path, monkeypatch):
    import shutil

    model = tiny_model("llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="are needed"):
        CalibrationRunner(model, [token_ids()], state_dir=tmp_path, progress=False).run(outputs)


def test_the_plan_says_what_a_run_takes():
    model = tiny_model("llama")
    plan = CalibrationRunner(model, [token_ids(4, 64)], progress=False).plan(lambda block, tokens: (1e9, 1000))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.blocks == 2
    assert plan.tokens == 256
    assert plan.peak_memory_bytes == weights + 2 * 256 * 64 * 4 + 1000
    assert plan.seconds > 0
    assert "256 calibration tokens" in str(plan)


def test_models_that_are_no_language_models():
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ValueError, match="not a causal language model"):
        find_decoder_blocks(BertModel(BertConfig(**small, vocab_size=32)))
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_decoder_blocks(T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=32)))


class Letters:
    """A tokenizer with one token a letter."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) % 128 for letter in text]}


def test_samples_of_text():
    samples = calibration_samples(["a" * 10, "b" * 15], Letters(), n_samples=3, seq_len=10)
    assert [tuple(s.shape) for s in samples] == [(1, 10), (1, 10)]
    assert [tuple(s.shape) for s in calibration_samples(["abc"], Letters(), seq_len=10)] == [(1, 3)]
    assert len(calibration_samples("builtin", Letters(), n_samples=5, seq_len=64)) == 5
    assert not set(builtin_text("evaluation").split("\n\n")) >= set(builtin_text().split("\n\n"))
    assert len(builtin_text()) > 100_000


def test_samples_of_ids():
    ids = token_ids(2, 5)
    assert torch.equal(calibration_samples([ids])[0], ids)
    assert torch.equal(calibration_samples(ids)[0], ids)
    assert calibration_samples(lambda: [[1, 2, 3]])[0].tolist() == [[1, 2, 3]]


def broken():
    yield "fine"
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    ("data", "tokenizer", "kind", "named"),
    [
        ([], None, ValueError, "empty"),
        ([""], Letters(), ValueError, "no tokens"),
        (["text"], None, ValueError, "tokenizer"),
        ("file.txt", Letters(), ValueError, "wanted 'builtin'"),
        ([3.5], None, TypeError, "sample 0"),
        ([[1, "a"]], None, TypeError, "sample 0"),
        ([[]], None, (TypeError, ValueError), "sample 0"),
        (17, None, TypeError, "wanted texts"),
        ([[5, 500]], None, ValueError, "vocabulary ends at 127"),
        (broken, Letters(), ValueError, "sample 1 failed: no more"),
    ],
)
def test_bad_samples(data, tokenizer, kind, named):
    with pytest.raises(kind, match=named):
        calibration_samples(data, tokenizer, vocab_size=128)


def test_no_samples():
    with pytest.raises(ValueError, match="samples: empty"):
        CalibrationRunner(tiny_model("llama"), [])
