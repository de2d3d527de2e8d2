"""How LeRobot finds the methods."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
NAME = "lerobot_policy_pronghorn"


def test_the_distribution_keeps_the_name_that_lerobot_looks_for():
    distribution = importlib.metadata.distribution(NAME)
    # LeRobot compares metadata as they are written: a build backend that writes hyphens would hide the plugin.
    assert distribution.metadata["Name"] == NAME
    assert Path(importlib.util.find_spec(NAME).origin).name == f"{NAME}.py"


def test_both_distributions_are_of_one_version():
    main, small = (
        tomllib.loads(path.read_text())["project"]
        for path in (ROOT / "pyproject.toml", ROOT / "integrations" / NAME / "pyproject.toml")
    )
    assert small["version"] == main["version"]
    assert small["dependencies"] == [f"pronghorn[lerobot]=={main['version']}"]


def test_lerobots_programs_load_every_method():
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    from pronghorn.lerobot import register

    assert NAME in sys.modules
    assert {outcome.state for outcome in register()} == {"loaded"}


def test_methods_are_also_found_by_discover_packages_path():
    code = f"""
import sys
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig

@parser.wrap()
def main(cfg: EvalPipelineConfig):
    print(cfg.policy.type, "{NAME}" in sys.modules)

sys.argv = ["eval", "--policy.discover_packages_path=pronghorn.lerobot", "--policy.type=vlash", "--policy.base=act",
            "--policy.device=cpu", "--env.type=pusht"]
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["vlash", "False"], found.stderr[-2000:]
