"""The `pronghorn` command, as users call it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.faults.fake_distribution import fake_distribution
from tests.integrations.test_methods import FAULTS, run

ROOT = Path(__file__).parents[2]


def pronghorn(*arguments, **options):
    command = [sys.executable, "-c", "from pronghorn.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, **options)


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys\nfrom pronghorn.cli import main\nsys.argv = ['pronghorn', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    start = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip().endswith("False")
    assert "verify" in found.stdout
    assert "awq" in found.stdout
    assert time.monotonic() - start < 5  # a second by itself; the machine is shared


def test_info_is_json():
    found = json.loads(pronghorn("info", "--json").stdout)
    assert found["versions"]["torch"]
    assert {plugin["ecosystem"]: plugin["state"] for plugin in found["plugins"] if plugin["method"] == "awq"} == {
        "transformers": "loaded",
        "vllm": "loaded",
    }


def test_info_says_what_is_wrong_and_what_mends_it(tmp_path):
    """Also where a plugin prints: the report is the only thing on the standard output."""
    entry_points = {
        "pronghorn.transformers": {"badluck": "badluck_plugin:register", "chatty": "chatty_plugin:register"},
        "pronghorn.lerobot": {"badluck": "badluck_plugin:register"},
    }
    chatty = "print('imported')\ndef register():\n    print('registered')\n"
    files = {"badluck_plugin.py": FAULTS["import error"][0], "chatty_plugin.py": chatty}
    fake_distribution(tmp_path, "bad-luck", entry_points, files)
    code = "import sys; sys.argv = ['pronghorn', 'info'{}]; from pronghorn.cli import main; main()"
    report = run(code.format(", '--json'"), tmp_path, PRONGHORN_DISABLE="awq")
    assert "registered" in report.stderr
    found = {(plugin["method"], plugin["ecosystem"]): plugin for plugin in json.loads(report.stdout)["plugins"]}
    assert found["chatty", "transformers"]["state"] == "loaded"
    wanted = {
        ("awq", "transformers"): ("disabled", "unset PRONGHORN_DISABLE"),
        ("badluck", "transformers"): ("failed", "pip install bad-luck"),
        ("badluck", "lerobot"): ("unavailable", "pip install 'pronghorn[lerobot]'"),
    }
    for key, (state, remedy) in wanted.items():
        assert (found[key]["state"], found[key]["remedy"]) == (state, remedy)
        assert found[key]["reason"]
    table = run(code.format(""), tmp_path).stdout
    assert "badluck in transformers: ModuleNotFoundError" in table
    assert "to mend it: pip install bad-luck" in table


def test_verify_reports_a_broken_method_and_goes_on(tmp_path):
    entry_points = {"pronghorn.verify": {"badluck": "badluck_plugin:replay"}}
    fake_distribution(tmp_path, "bad-luck", entry_points, {"badluck_plugin.py": FAULTS["import error"][0]})
    code = (
        "import sys; sys.argv[1:] = ['verify', 'badluck', 'dequantize_weight']; from pronghorn.cli import main; main()"
    )
    found = run(code, tmp_path)
    assert found.returncode == 1
    assert "badluck: not available: ModuleNotFoundError" in found.stdout
    assert "limits measured here" in found.stdout


def test_verify_checks_an_operation_and_a_method():
    found = pronghorn("verify", "dequantize_weight", "awq")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "dequantize" in found.stdout
    assert "official results" in found.stdout


def test_verify_fails_where_a_check_fails(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "awq"
    folder.mkdir()
    tensors = load_file(ROOT / "tests/golden/data/awq/pack_v2_codes_only.safetensors")
    tensors["qweight"] = tensors["qweight"] ^ torch.tensor(1, dtype=torch.int16)
    save_file(tensors, folder / "pack_v2_codes_only.safetensors")
    found = pronghorn("verify", "awq", env={**os.environ, "PRONGHORN_GOLDEN": str(tmp_path)})
    assert found.returncode == 1


def test_mistakes_are_one_line():
    for arguments, named in (
        (["verify", "nothing"], "neither an operation nor a method"),
        (["awq", "convert", "/nowhere", "/nowhere/else", "--to", "gemm"], "/nowhere"),
    ):
        found = pronghorn(*arguments)
        assert found.returncode == 1
        assert named in found.stderr
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize("fault", ["import error", "syntax error", "exits while it is imported"])
def test_a_broken_command_leaves_the_others(tmp_path, fault):
    entry_points = {"pronghorn.cli": {"badluck": "badluck_plugin:app"}}
    fake_distribution(tmp_path, "bad-luck", entry_points, {"badluck_plugin.py": FAULTS[fault][0]})
    code = "import sys; sys.argv = ['pronghorn', {!r}]; from pronghorn.cli import main; main()"
    assert "badluck" in run(code.format("--help"), tmp_path).stdout
    assert run(code.format("list"), tmp_path).returncode == 0
    broken = run(code.format("badluck"), tmp_path)
    assert broken.returncode == 1
    assert "badluck is not available" in broken.stderr
