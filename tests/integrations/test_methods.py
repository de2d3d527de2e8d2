"""Plugins of other distributions: found, registered once, and unable to break anything else."""

import json
import os
import subprocess
import sys

import pytest
from tests.faults.fake_distribution import fake_distribution

GOOD = "COUNT = 0\ndef register():\n    global COUNT\n    COUNT += 1\n"
FAULTS = {
    "import error": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "no register": ("x = 1", "AttributeError"),
    "raises": ("def register():\n    raise RuntimeError('out of luck')\n", "out of luck"),
    "exits": ("import sys\ndef register():\n    sys.exit('bye')\n", "SystemExit"),
    "exits while it is imported": ("import sys\nsys.exit('bye')\n", "SystemExit"),
    "syntax error": ("def register(:\n", "SyntaxError"),
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


def test_registering_twice_registers_once(tmp_path):
    entry_points = {"pronghorn.transformers": {"fine": "fine_plugin:register"}}
    fake_distribution(tmp_path, "fine", entry_points, {"fine_plugin.py": GOOD})
    code = (
        "import pronghorn.transformers as t; t.register(); t.register(); import fine_plugin; print(fine_plugin.COUNT)"
    )
    assert run(code, tmp_path).stdout.strip().endswith("1")


def test_a_register_that_comes_back_registers_once(tmp_path):
    again = f"{GOOD}    import pronghorn.transformers as t\n    t.register()\n"
    entry_points = {"pronghorn.transformers": {"again": "again_plugin:register"}}
    fake_distribution(tmp_path, "again", entry_points, {"again_plugin.py": again})
    code = (
        "from pronghorn.methods import register_all; found = register_all('transformers'); import again_plugin;"
        "print([o.state for o in found if o.method == 'again'], again_plugin.COUNT)"
    )
    assert run(code, tmp_path).stdout.strip().endswith("['loaded'] 1")


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


def test_two_plugins_of_one_name(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, module in ((first, "one"), (second, "two")):
        entry_points = {"pronghorn.transformers": {"twin": f"{module}:register"}}
        fake_distribution(folder, module, entry_points, {f"{module}.py": GOOD})
    found, log = states(os.pathsep.join(map(str, (first, second))))
    assert found["twin"][0] == "loaded"
    assert "two plugins are called 'twin'" in log


def test_an_unsupported_library_says_what_to_do(tmp_path):
    fake_distribution(tmp_path, "transformers", {}, {})  # version 1.0, found first
    found = run("import pronghorn.transformers", tmp_path)
    assert found.returncode != 0
    assert "pronghorn needs transformers >=5.16,<5.20, found 1.0: pip install 'pronghorn[transformers]'" in found.stderr


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
