"""Plugins of other distributions: found, registered once, and unable to break anything else."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults.fake_distribution import fake_distribution

from pronghorn import versions
from pronghorn.methods import ECOSYSTEMS

# Our own methods, which take seconds to import, and do it in other tests.
OWN = ",".join(path.name for path in (Path(__file__).parents[2] / "plugins" / "pronghorn").glob("[a-z]*"))

GOOD = "COUNT = 0\ndef register():\n    global COUNT\n    COUNT += 1\n"
FAULTS = {
    "import error": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "no register": ("x = 1", "AttributeError"),
    "raises": ("def register():\n    raise RuntimeError('out of luck')\n", "out of luck"),
    "exits": ("import sys\ndef register():\n    sys.exit('bye')\n", "SystemExit"),
    "exits while it is imported": ("import sys\nsys.exit('bye')\n", "SystemExit"),
    "syntax error": ("def register(:\n", "SyntaxError"),
}


# What is no error, but was not asked for: loaded all the same, and said.
ODD = {
    "slow": (
        "import time\nreal = time.perf_counter\ndef register():\n    time.perf_counter = lambda: real() + 30\n",
        "it took 30 s to load",
    ),
    "prints": ("print('hello')\ndef register():\n    print('{')\n", ""),
    "changes the directory": (
        "import os\ndef register():\n    os.chdir('/')\n",
        "it changed the working directory, which was put back",
    ),
    "changes torch": (
        "import torch as t\ndef register():\n    t.set_default_dtype(t.float64)\n    t.set_grad_enabled(False)\n",
        "it changed torch's default dtype, which was put back; it changed torch's gradients, which was put back",
    ),
    "fine": (GOOD, ""),
}


def run(code, folder, **variables):
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


STATES = (
    "import json, pronghorn.transformers; from pronghorn.methods import outcomes; pronghorn.transformers.register();"
    "print(json.dumps({o.method: [o.state, o.reason] for o in outcomes('transformers')}))"
)


def states(folder, **variables):
    found = run(STATES, folder, **variables)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1]), found.stderr


EVERYTHING = """
import json, logging, os, torch
from pronghorn.methods import outcomes, register_all
logging.basicConfig(format="%(levelname)s %(message)s")
before = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
register_all({0!r}); register_all({0!r})
assert (os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()) == before
import fine_plugin
print(fine_plugin.COUNT)
print(json.dumps({{o.method: [o.state, o.reason] for o in outcomes({0!r})}}))
"""


@pytest.mark.fault(17)
@pytest.mark.parametrize("ecosystem", ECOSYSTEMS)
def test_every_fault_at_once_in_every_ecosystem(tmp_path, ecosystem):
    """Each plugin ends as its fault says, with one warning, and whatever the others do."""
    plugins = {**FAULTS, **ODD}
    modules = {fault: fault.replace(" ", "_") + "_plugin" for fault in plugins}
    entries = {fault.replace(" ", "_"): f"{module}:register" for fault, module in modules.items()}
    files = {f"{module}.py": plugins[fault][0] for fault, module in modules.items()}
    fake_distribution(tmp_path, "bad-luck", {f"pronghorn.{ecosystem}": entries}, files)
    found = run(EVERYTHING.format(ecosystem), tmp_path, PRONGHORN_DISABLE=OWN)
    assert found.returncode == 0, found.stderr
    *_, count, outcomes = found.stdout.splitlines()
    assert count == "1"
    states = {name: said for name, said in json.loads(outcomes).items() if said[0] != "disabled"}
    assert states.keys() == entries.keys()
    warned = [line for line in found.stderr.splitlines() if line.startswith("WARNING")]
    for fault, (_, reason) in plugins.items():
        name = fault.replace(" ", "_")
        assert states[name][0] == ("failed" if fault in FAULTS else "loaded"), fault
        assert reason in states[name][1], fault
        assert bool(states[name][1]) == bool(reason), fault
        assert sum(f" {name} (bad-luck 1.0)" in line for line in warned) == bool(reason), (fault, warned)


@pytest.mark.fault(17)
def test_info_names_every_broken_plugin_and_stays_json(tmp_path):
    plugins = {**FAULTS, **ODD}
    entries = {fault.replace(" ", "_"): f"{fault.replace(' ', '_')}_plugin:register" for fault in plugins}
    files = {f"{fault.replace(' ', '_')}_plugin.py": content for fault, (content, _) in plugins.items()}
    fake_distribution(tmp_path, "bad-luck", {"pronghorn.transformers": entries}, files)
    code = "import sys; sys.argv = ['pronghorn', 'info', '--json']; from pronghorn.cli import main; main()"
    found = run(code, tmp_path, PRONGHORN_DISABLE=OWN)
    assert found.returncode == 0, found.stderr
    said = {plugin["method"]: plugin["reason"] for plugin in json.loads(found.stdout)["plugins"]}
    for fault, (_, reason) in plugins.items():
        assert reason in said[fault.replace(" ", "_")]


@pytest.mark.fault(17)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_named_and_breaks_nothing(tmp_path, fault):
    content, reason = FAULTS[fault]
    entry_points = {"pronghorn.transformers": {"badluck": "badluck_plugin:register", "fine": "fine_plugin:register"}}
    fake_distribution(tmp_path, "bad-luck", entry_points, {"badluck_plugin.py": content, "fine_plugin.py": GOOD})
    found, log = states(tmp_path)
    assert found["badluck"][0] == "failed"
    assert reason in found["badluck"][1]
    assert "badluck (bad-luck 1.0) is not available in transformers" in log
    assert found["fine"][0] == found["awq"][0] == "loaded"


@pytest.mark.fault(17)
def test_registering_twice_registers_once(tmp_path):
    entry_points = {"pronghorn.transformers": {"fine": "fine_plugin:register"}}
    fake_distribution(tmp_path, "fine", entry_points, {"fine_plugin.py": GOOD})
    code = (
        "import pronghorn.transformers as t; t.register(); t.register(); import fine_plugin; print(fine_plugin.COUNT)"
    )
    assert run(code, tmp_path).stdout.strip().endswith("1")


@pytest.mark.fault(17)
def test_a_register_that_comes_back_registers_once(tmp_path):
    again = f"{GOOD}    import pronghorn.transformers as t\n    t.register()\n"
    entry_points = {"pronghorn.transformers": {"again": "again_plugin:register"}}
    fake_distribution(tmp_path, "again", entry_points, {"again_plugin.py": again})
    code = (
        "from pronghorn.methods import register_all; found = register_all('transformers'); import again_plugin;"
        "print([o.state for o in found if o.method == 'again'], again_plugin.COUNT)"
    )
    assert run(code, tmp_path).stdout.strip().endswith("['loaded'] 1")


@pytest.mark.fault(17)
def test_threads_register_once_and_do_not_lock_each_other_out(tmp_path):
    """Two methods that each register the other's ecosystem, at the same time."""
    entry_points = {"pronghorn.diffusers": {"a": "a_plugin:register"}, "pronghorn.trl": {"b": "b_plugin:register"}}
    slow = f"import time\nfrom pronghorn.methods import register_all\n{GOOD}    time.sleep(0.2)\n"
    slow += "    register_all({!r})\n"
    files = {"a_plugin.py": slow.format("trl"), "b_plugin.py": slow.format("diffusers")}
    fake_distribution(tmp_path, "crossing", entry_points, files)
    code = (
        "from concurrent.futures import ThreadPoolExecutor; from pronghorn.methods import register_all, outcomes\n"
        "with ThreadPoolExecutor(8) as pool: list(pool.map(register_all, ['diffusers', 'trl'] * 4))\n"
        "import a_plugin, b_plugin; print(a_plugin.COUNT, b_plugin.COUNT, outcomes('trl')[0].state)"
    )
    assert run(code, tmp_path).stdout.strip() == "1 1 loaded"


def test_the_users_switch(tmp_path):
    found, _ = states(tmp_path, PRONGHORN_DISABLE="awq, lserve")
    assert found["awq"] == ["disabled", "PRONGHORN_DISABLE names it"]


@pytest.mark.fault(17)
def test_two_plugins_of_one_name(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, module in ((first, "one"), (second, "two")):
        entry_points = {"pronghorn.transformers": {"twin": f"{module}:register"}}
        fake_distribution(folder, module, entry_points, {f"{module}.py": GOOD})
    found, log = states(os.pathsep.join(map(str, (first, second))))
    assert found["twin"][0] == "loaded"
    assert "two plugins are called 'twin'" in log


@pytest.mark.fault(18)
@pytest.mark.parametrize("version", [None, "0.1", "999.0"])
@pytest.mark.parametrize("ecosystem", ECOSYSTEMS)
def test_what_is_needed_what_is_there_and_what_to_do(ecosystem, version, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: version if name == ecosystem else "1.0")
    state = "it is not installed" if version is None else f"found {version}"
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.12.1")
    wanted = (
        f"pronghorn needs {ecosystem} {versions.SUPPORTED[ecosystem]}, {state}: pip install 'pronghorn[{ecosystem}]'"
    )
    assert versions.obstacle(ecosystem) == wanted
    with pytest.raises(ImportError) as refused:
        versions.require(ecosystem)
    assert str(refused.value) == wanted


@pytest.mark.fault(18)
@pytest.mark.parametrize("version", [None, "0.5.0"])
def test_a_python_that_is_too_old_for_a_library_is_said(version, monkeypatch):
    """Its marker would let `pip install 'pronghorn[lerobot]'` succeed there, and install no LeRobot."""
    monkeypatch.setattr(versions, "installed", lambda name: version)
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.11.7")
    said = versions.obstacle("lerobot")
    assert "it wants Python >=3.12, this is 3.11.7: python3.12 -m pip install 'pronghorn[lerobot]'" in said
    assert said.endswith(versions.remedy("lerobot"))
    assert versions.remedy("transformers") == "pip install 'pronghorn[transformers]'"


@pytest.mark.fault(18)
@pytest.mark.parametrize("ecosystem", ["transformers", "trl", "lerobot"])
def test_an_unsupported_library_says_what_to_do(tmp_path, ecosystem):
    """Before anything of it is imported: in its place stands what would fail."""
    fake_distribution(tmp_path, ecosystem, {}, {f"{ecosystem}.py": "raise RuntimeError('imported')"})  # found first
    found = run(f"import pronghorn.{ecosystem}", tmp_path)
    supported = versions.SUPPORTED[ecosystem]
    message = f"pronghorn needs {ecosystem} {supported}, found 1.0"
    if ecosystem == "lerobot" and sys.version_info < (3, 12):
        message += f", and it wants Python >=3.12, this is {platform.python_version()}"
    message += f": {versions.remedy(ecosystem)}"
    assert found.returncode != 0
    assert found.stderr.strip().endswith(f"ImportError: {message}")


@pytest.mark.fault(18)
def test_a_half_imported_library_fails_by_its_name(tmp_path):
    """Of a supported version, and empty: as an interrupted upgrade leaves it."""
    fake_distribution(tmp_path, "transformers", {}, {"transformers/__init__.py": ""}, version="5.17.0")
    found, log = states(tmp_path)
    for name in ("awq", "duoattention"):
        assert found[name][0] == "failed"
        assert re.match(r"(ImportError|ModuleNotFoundError): .*transformers", found[name][1]), found[name]
    assert "AttributeError" not in log


@pytest.mark.fault(18)
@pytest.mark.parametrize("module", ["methods", "versions", "kernels", "cli"])
def test_what_is_imported_first_is_quick_and_imports_no_torch(module):
    code = (
        f"import time, sys; start = time.process_time(); import pronghorn.{module};"
        "print(time.process_time() - start, 'torch' in sys.modules)"
    )
    seconds, torch = min(run(code, "").stdout.split() for _ in range(3))
    assert float(seconds) < 0.2
    assert torch == "False"


@pytest.mark.fault(17)
def test_vllm_registration_never_raises(tmp_path):
    entry_points = {"pronghorn.vllm": {"badluck": "badluck_plugin:register"}}
    fake_distribution(tmp_path, "bad-luck", entry_points, {"badluck_plugin.py": FAULTS["raises"][0]})
    code = (
        "import pronghorn.vllm as v; v.register(); v.register(); from pronghorn.methods import outcomes;"
        "print([(o.method, o.state) for o in outcomes('vllm')])"
    )
    found = run(code, tmp_path)
    assert found.returncode == 0, found.stderr
    assert "('awq', 'loaded'), ('badluck', 'failed')" in found.stdout
    broken = run(
        "import sys; sys.modules['pronghorn.methods'] = None; import pronghorn.vllm as v; v.register()", tmp_path
    )
    assert broken.returncode == 0, broken.stderr
    assert "pronghorn is not available in vllm" in broken.stderr


def test_vllm_finds_us_by_its_own_entry_point():
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); load_general_plugins();"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as m; print('pronghorn_awq' in m)"
    )
    found = run(code, "")
    assert found.stdout.strip().endswith("True"), found.stderr
