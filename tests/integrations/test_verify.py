"""`pronghorn verify` where something is wrong: it says what, and goes on with the rest."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tests.faults.fake_distribution import fake_distribution
from tests.integrations.test_methods import run

import pronghorn.cli.verify
from pronghorn.kernels._operation import operations

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
VERIFY = "import sys; sys.argv[1:] = ['verify', *{!r}]; from pronghorn.cli import main; main()"
BROKEN = """
def nothing(path, device): return []
def raises(path, device): raise RuntimeError("out of luck")
"""


@pytest.fixture
def patched(monkeypatch):
    """The report on one or two operations, the first of which computes with `function`."""
    known = {operation.name: operation for operation in operations()}

    def verify(capsys, make, *others):
        broken = dataclasses.replace(known["bias_activation"], function=make(known["bias_activation"].function))
        chosen = [broken, *(known[name] for name in others)]
        monkeypatch.setattr(pronghorn.cli.verify, "operations", lambda: chosen)
        passed = pronghorn.cli.verify.verify([operation.name for operation in chosen], as_json=True)
        return passed, json.loads(capsys.readouterr().out)["operations"]

    return verify


@pytest.mark.parametrize("wrong", [1, 2])
def test_nan_of_any_shape_fails(patched, capsys, wrong):
    def at_one_shape(function):
        calls = 0

        def called(**arguments):
            nonlocal calls
            calls += 1
            return function(**arguments) * (float("nan") if calls == wrong else 1)

        return called

    passed, (found,) = patched(capsys, at_one_shape)
    assert not passed
    assert not found["checks"][0]["passed"]


def test_an_operation_that_raises_leaves_the_others(patched, capsys):
    def broken(function):
        def called(**arguments):
            raise RuntimeError("out\nof luck")

        return called

    passed, (found, other) = patched(capsys, broken, "dequantize_weight")
    assert not passed
    assert found["reason"] == "failed: RuntimeError: out of luck"
    assert other["passed"]
    assert other["seconds"] > 0


@pytest.fixture
def broken_methods(tmp_path):
    """Two whose replays are wrong, and files for them and AWQ."""
    points = {"nothing": "broken_plugin:nothing", "raises": "broken_plugin:raises"}
    fake_distribution(tmp_path, "bad-luck", {"pronghorn.verify": points}, {"broken_plugin.py": BROKEN})
    for name in ("awq", *points):
        (tmp_path / "golden" / name).mkdir(parents=True)
        shutil.copy(GOLDEN / "awq" / "pack_v2_codes_only.safetensors", tmp_path / "golden" / name)
    return tmp_path


def test_a_replay_that_raises_or_compares_nothing_leaves_the_others(broken_methods):
    code = VERIFY.format(["raises", "nothing", "awq"])
    found = run(code, broken_methods, PRONGHORN_GOLDEN=str(broken_methods / "golden"))
    assert found.returncode == 1
    assert "raises: pack_v2_codes_only: failed: RuntimeError: out of luck" in found.stdout
    assert "nothing: pack_v2_codes_only: failed: nothing of it was compared" in found.stdout
    assert "awq, official results" in found.stdout
    assert "failed: nothing, raises" in found.stdout


def test_reference_data_are_found_from_elsewhere(tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); " + VERIFY.format(["dcae"])
    found = run(code, tmp_path, PRONGHORN_GOLDEN="")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "dcae, official results" in found.stdout


def test_without_reference_data_a_method_is_skipped_unless_it_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PRONGHORN_GOLDEN", str(tmp_path / "empty"))
    monkeypatch.setattr(pronghorn.cli.verify, "operations", lambda: [])
    assert pronghorn.cli.verify.verify([])
    said = capsys.readouterr().out
    assert "awq: skipped: no reference data here" in said
    assert "all 0 passed" in said
    assert not pronghorn.cli.verify.verify(["awq"])
    assert "failed: awq" in capsys.readouterr().out
