"""How LeRobot finds the methods."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


OF_COMMANDS = {  # its configuration, what else it wants, and whose prefix docs/ecosystems/lerobot.md names
    "lerobot-eval": ("lerobot.configs.eval", "EvalPipelineConfig", ["--env.type=pusht"], "env"),
    "lerobot-train": ("lerobot.configs.train", "TrainPipelineConfig", ["--dataset.repo_id=a/b"], "env"),
    "lerobot-rollout": ("lerobot.rollout.configs", "RolloutConfig", ["--robot.type=so101_follower", "--robot.port=x"],
                        "robot"),
}  # fmt: skip


@pytest.mark.parametrize("command", OF_COMMANDS)
def test_the_documented_flag_works_with_checkpoints(command, tmp_path):
    """And `--policy.discover_packages_path` does not: the day it does, the docs can be shorter."""
    module, name, words, prefix = OF_COMMANDS[command]
    assert f"`--{prefix}.discover_packages_path=pronghorn.lerobot`" in (ROOT / "docs/ecosystems/lerobot.md").read_text()
    (tmp_path / "config.json").write_text(json.dumps({"type": "vlash", "base": "act", "device": "cpu"}))
    code = f"""
import sys
from lerobot.configs import parser
from lerobot.robots import so_follower
from {module} import {name}

@parser.wrap()
def main(cfg: {name}):
    getattr(cfg, "validate", lambda: None)()
    print(cfg.policy.type, "{NAME}" in sys.modules)

for prefix in ({prefix!r}, "policy"):
    given = ["--policy.path={tmp_path}", "--policy.push_to_hub=false", *{words}]
    sys.argv = ["command", f"--{{prefix}}.discover_packages_path=pronghorn.lerobot", *given]
    main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["vlash", "False"], found.stderr[-2000:]
    assert "unrecognized arguments: --discover_packages_path" in found.stderr


def test_the_extra_has_what_the_documented_commands_import():
    """Its requirements, with those of LeRobot's extras, are what this environment holds, in versions that fit."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lerobot"]
    wanted, seen = list(map(Requirement, extras)), set()
    wrong = []
    while wanted:
        requirement = wanted.pop()
        version = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}: {version}")
        seen.add(requirement.name)
        for text in importlib.metadata.requires(requirement.name) or ():
            inner = Requirement(text)
            named = [extra for extra in requirement.extras if inner.marker and inner.marker.evaluate({"extra": extra})]
            if named and str(inner) not in seen:
                seen.add(str(inner))
                wanted.append(inner)
    assert wrong == []
    assert {"datasets", "av", "accelerate", "wandb", "transformers", "scipy", "peft", "grpcio", "pillow"} <= seen
    page = (ROOT / "docs/ecosystems/lerobot.md").read_text()
    offered = importlib.metadata.metadata("lerobot").get_all("Provides-Extra")
    for extra in ("pusht", "feetech", "smolvla", "diffusion"):
        assert extra in offered
        assert f"lerobot[{extra}]" in page
    for requirement in map(Requirement, extras):
        if requirement.name == "lerobot":
            assert requirement.extras <= set(offered)
            assert all(f"`{extra}`" in page for extra in requirement.extras)
