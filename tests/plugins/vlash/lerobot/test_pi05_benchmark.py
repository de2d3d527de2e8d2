"""The benchmark of pi0.5, in small."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch, tiny_pi):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[4] / "benchmarks"))
    import vlash_pi05

    return vlash_pi05


@pytest.fixture
def size(benchmark):
    return benchmark.Size(
        image=28, text=7, words=5, vocabulary=100, horizon=25, steps=2, batch=2, repeats=2, seconds=1.2
    )


def of(rows, what):
    return [row for row in rows if row["what"].startswith(what)]


def test_a_chunk_is_that_of_lerobots(benchmark, size):
    rows = benchmark.chunk_rows(size)
    json.dumps(rows)
    assert {row["against"] for row in of(rows, "one chunk")} == {"LeRobot, eager", "the limit"}
    (exact,) = of(rows, "difference")
    assert 0 < exact["ours"]["p50"] < 2 * exact["theirs"]["p50"] < 0.1


def test_lerobots_is_compiled_as_its_option_does(benchmark, size, monkeypatch):
    modes = []
    monkeypatch.setattr("torch.compile", lambda function, mode: modes.append(mode) or function)
    (row,) = benchmark.compiled_rows(size)
    assert modes == ["max-autotune"]
    assert row["against"] == "LeRobot, compiled (max-autotune)"


def test_training_steps_are_held_against_as_many_passes(benchmark, size):
    rows = benchmark.shared_rows(size)
    json.dumps(rows)
    assert [row["what"] for row in rows] == ["training step, 4 delays"] * 2 + ["training step, 9 delays"] * 2
    tokens = 2 * 4 + 7  # as many as two images and a prompt of that size
    assert rows[2]["reach"] == pytest.approx(0.85 * 9 * (tokens + 25) / (tokens + 9 * 25))


def test_a_robot_is_controlled_in_real_time(benchmark, size):
    for _ in range(3):  # in a second, other work on the same cores may make a chunk late
        rows = benchmark.control_rows(size)
        single, merged = of(rows, "time for an action")
        if merged["ours"]["p50"] < 0.75 * single["ours"]["p50"]:
            break
    json.dumps(rows)
    assert all(row["ours"]["p50"] == 0 for row in of(rows, "stalls"))
    assert merged["ours"]["p50"] < 0.75 * single["ours"]["p50"]
    assert all(row["ratio"] > 1 for row in of(rows, "reaction by the paper's formula"))
