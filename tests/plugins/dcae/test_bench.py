"""Timings of autoencoders: forms, shapes, the command, and the parts of benchmarks/dcae.py at tiny sizes."""

import importlib
import json
from pathlib import Path

import diffusers
import pytest
import torch
from tests.plugins.dcae.test_acceleration import lively
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_cli import folder, run  # noqa: F401 - a fixture

from pronghorn.dcae.bench import FORMS, Speed, Timing, bench, in_form, inputs, rehearse, timed

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def stock():
    return lively(diffusers.AutoencoderDC.from_config(dict(small().config))).eval()


@pytest.fixture
def compiled(monkeypatch):
    """What would have been compiled: compilers take their time."""
    found = []

    def compile_module(module, *, dynamic, fullgraph=False):
        assert not dynamic
        found.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_module)
    return found


@torch.no_grad()
@pytest.mark.parametrize("make", [stock, small])
def test_all_forms_compute_the_same(make, compiled):
    vae = make()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    for what, x in inputs(vae, 8, 2).items():
        wanted = (vae.encoder if what == "encode" else vae.decoder)(x)
        for form in FORMS:
            with in_form(vae, form) as sides:
                torch.testing.assert_close(sides[what](x), wanted, rtol=1e-4, atol=2e-5)
    assert len(compiled) == 2 * 2 * 2
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(value.is_contiguous() for value in vae.state_dict().values())


def test_bench():
    found = list(bench(small(), sizes=[8, 12], batch_sizes=[1, 2], repeats=5))
    assert [(one.size, one.batch_size, one.form, one.what) for one in found] == [
        (size, batch, form, what) for size in (8, 12) for batch in (1, 2) for form in ("stock", "accelerated")
        for what in ("encode", "decode")
    ]  # fmt: skip
    for one in found:
        seconds = one.timing.seconds
        assert 0 < seconds["p20"] <= seconds["p50"] <= seconds["p80"]
        assert one.timing.peak_bytes is None or torch.cuda.is_available()


def test_what_does_not_fit_is_told(monkeypatch):
    vae = small()

    def fail(z):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae.decoder, "forward", fail)
    found = list(bench(vae, sizes=[8], batch_sizes=[1], forms=["stock"], repeats=1))
    assert [one.timing is None for one in found] == [False, True]
    assert found[1].to_dict()["timing"] is None


def test_quantiles(monkeypatch):
    times = iter([value for second in (5, 1, 4, 2, 3) for value in (0.0, float(second))])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert timed(lambda: None, torch.device("cpu"), repeats=5).seconds == {"p20": 2, "p50": 3, "p80": 4}


@pytest.mark.parametrize(("given", "match"), [
    ({"sizes": [9]}, "sizes: got 9, wanted multiples of 2"), ({"batch_sizes": [0]}, "batch_sizes: got"),
    ({"sizes": []}, "sizes: got"), ({"repeats": 0}, "repeats: got"),
    ({"forms": ["fast"]}, "accepted are stock, compiled"),
])  # fmt: skip
def test_bad_input_is_named(given, match):
    with pytest.raises(ValueError, match=match):
        next(bench(small(), **{"sizes": [8], "batch_sizes": [1], **given}))


def test_a_rehearsal_counts_all_repeats(monkeypatch):
    """Of what fits."""
    timing = Timing({"p20": 1.0, "p50": 2.0, "p80": 3.0}, 1 << 60)
    found = [
        Speed("stock", what, 8, 1, one) for what, one in (("encode", timing), ("decode", timing), ("encode", None))
    ]
    monkeypatch.setattr("pronghorn.dcae.bench.bench", lambda vae, *, repeats, sizes: found if repeats == 1 else [])
    said = rehearse(small(), repeats=11, sizes=[8])
    assert said.seconds == pytest.approx(10 * 4, abs=1)
    assert (said.memory_bytes, said.disk_bytes) == (1 << 60, 0)


def test_the_command(folder, tmp_path, monkeypatch, compiled):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "120")
    words = ["--sizes", "8", "--batch-sizes", "1,2", "--repeats", 2, "--device", "cpu"]
    said = run("bench", folder, *words, "--json", tmp_path / "bench.json")
    assert "accelerated" in said
    assert "speed-up" in said
    assert len(json.loads((tmp_path / "bench.json").read_text())) == 2 * 2 * 2
    said = run("bench", folder, *words, "--json", tmp_path / "none.json", "--dry-run")
    assert "peak memory" in said
    assert "one of 2 repeats" in said
    assert not (tmp_path / "none.json").exists()
    # By its published name, with random weights.
    assert "compiled" in run("bench", "tiny", *words, "--forms", "compiled", "--dtype", "bfloat16")
    for extra, match in ((["--dtype", "int8"], "dtype: got 'int8'"), (["--forms", "quick"], "forms: got")):
        with pytest.raises(ValueError, match=match):
            run("bench", folder, *words, *extra)
    with pytest.raises(ValueError, match="name: got 'unknown', known are"):
        run("bench", "unknown", *words)
    with pytest.raises(AssertionError, match="wanted numbers with commas"):
        run("bench", folder, "--sizes", "8,large")


def test_benchmark(monkeypatch, tmp_path, compiled):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OUT", str(tmp_path))
    dcae = importlib.import_module("dcae")
    monkeypatch.setattr("sys.argv", ["dcae.py", "speed"])
    with pytest.raises(SystemExit, match="parts: got speed"):
        dcae.main()
    if torch.cuda.is_available():
        pytest.skip("its sizes on a GPU take minutes")
    parts = ["autoencoder", "compiled", "compiled_sana", "convolutions", "memory", "uvit"]
    monkeypatch.setattr("sys.argv", ["dcae.py", *parts])
    for name, value in {"SHAPES": [(16, 1)], "LAST_BATCH": 1}.items():
        monkeypatch.setattr(dcae, name, value)
    dcae.main()
    rows = {part: json.loads((tmp_path / f"dcae-{part}-cpu.json").read_text())["rows"] for part in parts}
    assert {part: len(found) for part, found in rows.items()} == {
        "autoencoder": 4,
        "compiled": 8,
        "compiled_sana": 8,
        "convolutions": 2,
        "memory": 2,
        "uvit": 8,
    }
    assert {row["reach"] for row in rows["autoencoder"]} == {1.8}
    assert {row["reach"] for row in rows["compiled"]} == {1.2}
    assert all("differs from diffusers by 0.0%" in row["note"] for row in rows["autoencoder"])
    assert rows["memory"][0]["ratio"] >= 1
    assert [row["reach"] for row in rows["uvit"]] == [17.9, 19.1, None, 19.1, None, 17.9, 19.1, None]
    assert ["compiled" in row["what"] for row in rows["uvit"]] == [False] * 5 + [True] * 3
    assert any("_Block" in str(module) for module in compiled)
