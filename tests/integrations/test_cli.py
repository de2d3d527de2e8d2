"""The `pronghorn` command, as users call it."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.faults.fail_at_call import FailAtCall
from tests.faults.fake_distribution import fake_distribution
from tests.integrations.test_methods import FAULTS, run

from pronghorn import versions

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
    for name in ("list", "info", "seal", "verify", "check", "bench", "new", "awq"):
        assert f" {name} " in found.stdout
    assert time.monotonic() - start < 5  # a second by itself; the machine is shared


def test_info_is_json():
    found = json.loads(pronghorn("info", "--json").stdout)
    assert found["versions"]["torch"]
    assert {plugin["ecosystem"]: plugin["state"] for plugin in found["plugins"] if plugin["method"] == "awq"} == {
        "transformers": "loaded",
        "vllm": "loaded",
    }
    states = {(plugin["method"], plugin["ecosystem"]): plugin["state"] for plugin in found["plugins"]}
    wanted = [("dcae", "diffusers"), ("torchsparse", "torch"), ("vcpo", "trl")]
    assert [states.get(key) for key in wanted] == ["loaded"] * 3, "these need no registration"


def test_info_says_what_is_wrong_and_what_mends_it(tmp_path):
    """Also where a plugin prints: the report is the only thing on the standard output."""
    entry_points = {
        "pronghorn.transformers": {"badluck": "badluck_plugin:register", "chatty": "chatty_plugin:register"},
        "pronghorn.lerobot": {"badluck": "badluck_plugin:register"},
        "pronghorn.check": {"badluck": "badluck_plugin"},
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
        ("badluck", "lerobot"): ("unavailable", versions.remedy("lerobot")),
        ("badluck", "pronghorn check"): ("failed", "pip install bad-luck"),
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


def test_verify_skips_methods_whose_libraries_are_not_here(tmp_path):
    """As after `pip install` with one extra; a method that is asked for by name fails."""
    code = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(('diffusers', 'trl', 'transformers')))\n"
        "verify = importlib.import_module('pronghorn.cli.verify')\n"
        "verify.operations = list\n"
        "print(verify.verify(['dcae']), verify.verify([]))"
    )
    found = run(code, tmp_path)
    assert found.returncode == 0, found.stderr
    assert "dcae: not available: ModuleNotFoundError" in found.stdout
    assert "dcae: skipped: not available: ModuleNotFoundError" in found.stdout
    assert found.stdout.endswith("False True\n")


def test_verify_checks_an_operation_and_a_method():
    found = pronghorn("verify", "dequantize_weight", "awq")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "dequantize" in found.stdout
    assert "official results" in found.stdout
    assert "all 2 passed" in found.stdout


def test_verify_knows_all_that_has_landed():
    """Every kernel's folder, and every method with reference data."""
    from pronghorn.kernels._operation import operations
    from pronghorn.methods import entry_points

    folders = {path.parent.name for path in (ROOT / "kernels/pronghorn/kernels").glob("*/__init__.py")}
    assert {operation.name for operation in operations()} == folders
    golden = {path.name for path in (ROOT / "tests/golden/data").iterdir() if path.is_dir()}
    assert golden
    assert {entry.name for entry in entry_points("verify")} == golden


def test_verify_fails_where_a_check_fails(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "awq"
    folder.mkdir()
    tensors = load_file(ROOT / "tests/golden/data/awq/pack_v2_codes_only.safetensors")
    tensors["qweight"] = tensors["qweight"] ^ torch.tensor(1, dtype=torch.int16)
    save_file(tensors, folder / "pack_v2_codes_only.safetensors")
    found = pronghorn("verify", "awq", "--json", env={**os.environ, "PRONGHORN_GOLDEN": str(tmp_path)})
    assert found.returncode == 1
    report = json.loads(found.stdout)
    assert not report["passed"]
    assert [method["name"] for method in report["methods"] if not method["passed"]] == ["awq"]
    assert any(not check["passed"] for check in report["methods"][0]["checks"])


SCRIPT = """
from harness import write
def main():
    write()
main()
"""


def test_bench_says_what_there_is():
    for option in ("--list", "--dry-run"):
        found = pronghorn("bench", option)
        assert found.returncode == 0, found.stderr
        assert "geglu: can run here, a few timed calls, without a limit" in found.stdout


def test_bench_prints_json_and_names_what_runs(tmp_path):
    """`--json` is a flag, as it is of others: a name after it is a benchmark's."""
    found = pronghorn("bench", "--json", "bias_activation", "--out", str(tmp_path / "out.json"))
    assert found.returncode == 0, found.stderr
    assert [row["what"] for row in json.loads(found.stdout)["rows"]] == ["bias_activation"]
    assert found.stdout == (tmp_path / "out.json").read_text()
    assert "bias_activation" in found.stderr


def test_bench_runs_what_can_run_here(tmp_path, monkeypatch, capsys):
    from pronghorn.cli.bench import bench

    (tmp_path / "plugins" / "pronghorn").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "pronghorn"\n')
    scripts = {
        "good.py": SCRIPT,
        "large.py": 'NEEDS = ("cuda:99",)\n' + SCRIPT,
        "missing.py": "import nothing_of_that_name\n" + SCRIPT,
        "below.py": "import shared\n" + SCRIPT,
        "shared.py": "import nothing_of_that_name\n",
        "broken.py": SCRIPT.replace("    write()", "    raise ValueError('out of luck')"),
        "endless.py": SCRIPT.replace("    write()", "    while True: pass"),
        "harness.py": (
            "import os\nfrom pathlib import Path\nfrom pronghorn.measurement import row, write as keep\n"
            "def write():\n    times = {'p20': 1.0, 'p50': 1.0, 'p80': 1.0}\n"
            "    keep('good', [row('it', 'them', '2', times, times)], Path(os.environ['OUT']))\n"
        ),
    }
    (tmp_path / "benchmarks").mkdir()
    for name, content in scripts.items():
        (tmp_path / "benchmarks" / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    chosen = ["bias_activation", "good", "large", "missing", "below"]
    assert bench(chosen, seconds=60, out=tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {"topic", "device", "driver", "versions", "commit", "dirty", "date", "rows"} <= set(found)
    assert [entry["what"] for entry in found["rows"]] == ["bias_activation", "good: it"]
    assert found["rows"][0]["ours"]["p50"] > 0
    assert found["not_run"] == {
        "large": "needs 99 GPUs", "missing": "needs nothing_of_that_name", "below": "needs nothing_of_that_name",
    }  # fmt: skip
    assert not bench(["broken"], seconds=60, out=tmp_path / "bench.json")
    assert "failed: ValueError: out of luck" in json.loads((tmp_path / "bench.json").read_text())["not_run"]["broken"]
    (tmp_path / "benchmarks" / "unreadable.py").write_text("def main():\n" + SCRIPT)
    assert not bench(["unreadable"], seconds=60, out=tmp_path / "bench.json")
    reason = json.loads((tmp_path / "bench.json").read_text())["not_run"]["unreadable"]
    assert reason.startswith("failed: IndentationError")
    assert bench(["endless"], seconds=2, out=tmp_path / "bench.json")
    assert "took more than 2 s" in json.loads((tmp_path / "bench.json").read_text())["not_run"]["endless"]
    with pytest.raises(ValueError, match="no benchmark; there are"):
        bench(["nothing"], seconds=2, out=tmp_path / "bench.json")
    capsys.readouterr()
    assert bench([], seconds=2, out=tmp_path / "none.json", dry_run=True)
    said = capsys.readouterr().out
    assert "good: can run here, at most 2 s" in said
    assert "large: needs 99 GPUs" in said
    assert "awq bench: needs a model: pronghorn awq bench --help" in said
    assert not (tmp_path / "none.json").exists()


def test_bench_says_before_it_runs_where_it_cannot_write(tmp_path, monkeypatch, capsys):
    """And shows what it has measured before it writes, which may fail even so."""
    import pronghorn.cli.bench as room

    monkeypatch.setattr(room, "_measured", lambda *_: pytest.fail("it ran"))
    for out, reason in ((tmp_path, "is a folder"), (tmp_path / "nodir" / "b.json", "in a folder that is there")):
        for dry_run in (False, True):
            with pytest.raises(ValueError, match=f"out: got .*{reason}"):
                room.bench(["bias_activation"], seconds=1, out=out, dry_run=dry_run)
    times = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    monkeypatch.setattr(room, "_measured", lambda *_: [room.row("it", "them", "2", times, times)])
    monkeypatch.setattr(room, "write_atomically", FailAtCall(room.write_atomically, 1, OSError(28, "no room")))
    with pytest.raises(OSError, match="no room"):
        room.bench(["bias_activation"], seconds=1, out=tmp_path / "b.json")
    assert "them" in capsys.readouterr().out


def test_bench_goes_on_after_an_operation_that_raises(tmp_path, monkeypatch):
    """And writes what there is where it cannot go on."""
    import pronghorn.cli.bench as room
    from pronghorn.kernels._operation import operations

    known = {operation.name: operation for operation in operations()}

    def raises(error):
        def broken(**arguments):
            raise error

        return dataclasses.replace(known["bias_activation"], timed=broken)

    names, out, good = ["bias_activation", "dequantize_weight"], tmp_path / "bench.json", known["dequantize_weight"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "operations", lambda: [raises(RuntimeError("out of luck")), good])
    assert not room.bench(names, seconds=1, out=out)
    first = json.loads(out.read_text())
    assert first["not_run"] == {"bias_activation": "failed: RuntimeError: out of luck"}
    monkeypatch.setattr(room, "operations", lambda: [good, raises(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        room.bench(names, seconds=1, out=out)
    for found in (first, json.loads(out.read_text())):
        assert [row["what"] for row in found["rows"]] == ["dequantize_weight"]


def test_mistakes_are_one_line():
    for arguments, named in (
        (["verify", "nothing"], "neither an operation nor a method"),
        (["awq", "convert", "/nowhere", "/nowhere/else", "--to", "gemm"], "/nowhere"),
    ):
        found = pronghorn(*arguments)
        assert found.returncode == 1
        assert named in found.stderr
        assert "Traceback" not in found.stderr


ENDS = {
    "diverges": (
        "raise FloatingPointError('loss: got nan. Lower learning_rate')",
        "loss: got nan. Lower learning_rate",
    ),
    "python's memory": ("raise MemoryError", "out of memory: close other programs"),
    "torch's memory": ("import torch; raise torch.OutOfMemoryError('too\\nlarge: try less')", "too large: try less"),
    "memory of a CPU": ("import torch; torch.empty(1 << 60)", "can't allocate memory"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_user_can_mend_is_one_line(tmp_path, end):
    raised, said = ENDS[end]
    plugin = f"import typer\napp = typer.Typer()\n@app.command()\ndef go():\n    {raised}\n"
    fake_distribution(tmp_path, "bad-luck", {"pronghorn.cli": {"badluck": "ending:app"}}, {"ending.py": plugin})
    found = run("import sys; sys.argv = ['pronghorn', 'badluck']; from pronghorn.cli import main; main()", tmp_path)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("Error: ")
    assert said in line


def test_other_errors_keep_their_traceback(tmp_path):
    plugin = "import typer\napp = typer.Typer()\n@app.command()\ndef go():\n    raise RuntimeError('a fault of ours')\n"
    fake_distribution(tmp_path, "bad-luck", {"pronghorn.cli": {"badluck": "ending:app"}}, {"ending.py": plugin})
    found = run("import sys; sys.argv = ['pronghorn', 'badluck']; from pronghorn.cli import main; main()", tmp_path)
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert "a fault of ours" in found.stderr


@pytest.mark.parametrize("fault", ["import error", "syntax error", "exits while it is imported"])
def test_a_broken_command_leaves_the_others(tmp_path, fault):
    entry_points = {"pronghorn.cli": {"badluck": "badluck_plugin:app"}}
    fake_distribution(tmp_path, "bad-luck", entry_points, {"badluck_plugin.py": FAULTS[fault][0]})
    code = "import sys; sys.argv = ['pronghorn', *{!r}.split()]; from pronghorn.cli import main; main()"
    assert "badluck" in run(code.format("--help"), tmp_path).stdout
    assert run(code.format("list"), tmp_path).returncode == 0
    for words in ("badluck", "badluck train folder --steps 3"):
        broken = run(code.format(words), tmp_path)
        assert broken.returncode == 1
        assert "badluck is not available" in broken.stderr
    disabled = run(code.format("badluck train"), tmp_path, PRONGHORN_DISABLE="badluck")
    assert disabled.returncode == 1
    assert "badluck is not available: PRONGHORN_DISABLE names it" in disabled.stderr
