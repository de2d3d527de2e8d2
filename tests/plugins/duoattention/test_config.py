"""Patterns: read, written, thresholded; and what is no configuration."""

import json

import pytest

from pronghorn.duoattention import DuoAttentionConfig, published_patterns
from pronghorn.duoattention.pattern import load_pattern, save_pattern, threshold_gates

GATES = [[0.9, 0.1, 0.5], [0.2, 0.8, 0.7]]


@pytest.mark.parametrize("name", published_patterns())
def test_published_patterns_load_by_name(name):
    pattern = load_pattern(name)
    assert len(pattern.gates) == 32
    assert len(pattern.gates[0]) == (32 if "Llama-2" in name else 8)
    assert (pattern.settings["sink_size"], pattern.settings["recent_size"]) == (128, 256)
    full = DuoAttentionConfig.from_pattern(name, sparsity=0.5).full_heads()
    assert sum(map(sum, full)) == len(pattern.gates) * len(pattern.gates[0]) // 2


def test_a_configuration_is_saved_and_read(tmp_path):
    config = DuoAttentionConfig(gates=GATES, threshold=0.4, sink_size=8, kv_bits=4, decode_window="mask")
    config.save_pretrained(tmp_path)
    assert DuoAttentionConfig.from_pretrained(tmp_path) == config
    assert DuoAttentionConfig.from_pattern(tmp_path, threshold=0.4).gates == GATES
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["sink_size"], saved["recent_size"]) == (8, 256)  # what the authors' code reads
    with pytest.raises(ValueError, match="gates"):
        DuoAttentionConfig().save_pretrained(tmp_path)


def test_thresholds():
    assert threshold_gates(GATES, threshold=0.5) == [[True, False, True], [False, True, True]]
    assert threshold_gates(GATES, sparsity=0.5) == [[True, False, False], [False, True, True]]
    assert threshold_gates(GATES, sparsity=2 / 3, balance="per_layer") == [[True, False, False], [False, True, False]]
    assert threshold_gates(GATES, sparsity=0) == [[True] * 3] * 2
    assert threshold_gates(GATES, sparsity=1) == [[False] * 3] * 2
    assert threshold_gates([[7.0, -3.0]], threshold=1.0) == [[True, False]]  # gates are clipped to 0 … 1


@pytest.mark.parametrize("balance", ["global", "per_layer"])
def test_the_seed_decides_between_equal_gates(balance):
    equal = [[1.0] * 8] * 4
    chosen = {str(threshold_gates(equal, sparsity=0.5, balance=balance, seed=seed)) for seed in range(4)}
    assert len(chosen) == 4
    again = threshold_gates(equal, sparsity=0.5, balance=balance, seed=0)
    assert again == threshold_gates(equal, sparsity=0.5, balance=balance, seed=0)
    assert sum(map(sum, again)) == 16


@pytest.mark.parametrize(("options", "name"), [
    ({"gates": [[0.1, float("nan")]]}, "gates"),
    ({"gates": [[0.1], [0.1, 0.2]]}, "gates"),
    ({"gates": []}, "gates"),
    ({"gates": [["a"]]}, "gates"),
    ({"sink_size": 0}, "sink_size"),
    ({"sink_size": -4}, "sink_size"),
    ({"recent_size": 0}, "recent_size"),
    ({"recent_size": 2.5}, "recent_size"),
    ({"sparsity": 1.5}, "sparsity"),
    ({"sparsity": 0.5, "threshold": 0.5}, "threshold"),
    ({"threshold": float("nan")}, "threshold"),
    ({"kv_bits": 3}, "kv_bits"),
    ({"prefill": "dense"}, "prefill"),
    ({"block_size": 128}, "block_size"),
    ({"block_size": 128, "prefill": "streaming", "decode_window": "mask"}, "block_size"),
], ids=str)  # fmt: skip
def test_what_is_no_configuration(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        DuoAttentionConfig(**options)


@pytest.mark.parametrize(("table", "settings", "message"), [
    ("0.1\t0.2\n0.3\tx\n", "{}", "line 2"),
    ("0.1\t0.2\n0.3\n", "{}", "as many"),
    ("0.1\tnan\n", "{}", "finite"),
    ("", "{}", "table"),
    ("0.1\n", "{", "JSON"),
    ("0.1\n", "[]", "object"),
])  # fmt: skip
def test_damaged_patterns_are_refused(tmp_path, table, settings, message):
    (tmp_path / "full_attention_heads.tsv").write_text(table)
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises((ValueError, TypeError), match=message):
        load_pattern(tmp_path)


def test_an_unknown_pattern_names_those_that_are_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Mixtral-8x7B"):
        load_pattern("Llama-5")
    with pytest.raises(FileNotFoundError):
        load_pattern(tmp_path)


@pytest.mark.fault(8, 10)
def test_a_failing_write_leaves_the_old_pattern(tmp_path, monkeypatch):
    save_pattern(load_pattern("Mixtral-8x7B-Instruct-v0.1"), tmp_path)
    before = (tmp_path / "full_attention_heads.tsv").read_bytes()

    def fails(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="No space"):
        save_pattern(load_pattern("Llama-3-8B-Instruct-Gradient-1048k"), tmp_path)
    assert (tmp_path / "full_attention_heads.tsv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
