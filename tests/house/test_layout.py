"""The layout of the repository: what design says that no import or linter would notice."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "integrations", "plugins")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FORBIDDEN_NAMES = {"utils", "helpers", "base", "common", "misc", "other"}


def tracked_python() -> list[Path]:
    return sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py"))


def methods() -> set[str]:
    groups = PYPROJECT["project"]["entry-points"]
    return {name for group, entries in groups.items() if group.startswith("pronghorn.") for name in entries}


def run_at_root(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_real_libraries_import_from_the_root():
    """Our `kernels/` folder must not be taken for Hugging Face's package of that name."""
    code = (
        "import sys; sys.path.insert(0, ''); import transformers, diffusers;"
        "from transformers.utils import is_kernels_available;"
        "print(is_kernels_available(), transformers.__file__, diffusers.__file__)"
    )
    available, *files = run_at_root(code).splitlines()[-1].split(" ")
    assert available == "False"
    assert [file for file in files if Path(file).is_relative_to(ROOT)] == []


@pytest.mark.parametrize("library", ["transformers", "vllm", "diffusers", "trl", "triton", "peft"])
def test_rooms_do_not_shadow_libraries(library):
    code = f"import importlib.util; import pronghorn.awq; print(importlib.util.find_spec('{library}').origin)"
    origin = Path(run_at_root(code).splitlines()[-1])
    assert not any(origin.is_relative_to(ROOT / source) for source in SOURCES)


def test_namespace_packages_have_no_init():
    assert [str(path) for source in SOURCES for path in (ROOT / source / "pronghorn").glob("__init__.py")] == []
    assert [source for source in SOURCES if (ROOT / source / "__init__.py").exists()] == []


def test_entry_points_of_this_clone():
    """A cached environment shared with another clone must not lend its entry points, nor a child lose them."""
    wanted = {
        (group, name, value)
        for group, named in PYPROJECT["project"]["entry-points"].items()
        for name, value in named.items()
    }
    code = (
        "import importlib.metadata as m\n"
        "for e in m.distribution('pronghorn').entry_points: print(e.group, e.name, e.value)"
    )
    spawned = {tuple(line.split(" ")) for line in run_at_root(code).splitlines()}
    assert wanted <= spawned
    for group in {group for group, _, _ in wanted}:
        here = {(group, entry.name, entry.value) for entry in importlib.metadata.entry_points(group=group)}
        assert {entry for entry in wanted if entry[0] == group} <= here


def test_sources_are_this_clone():
    import pronghorn.awq
    import pronghorn.kernels
    import pronghorn.methods

    found = [Path(module.__file__).resolve() for module in (pronghorn.kernels, pronghorn.methods, pronghorn.awq)]
    assert [path.is_relative_to(ROOT / source) for path, source in zip(found, SOURCES, strict=True)] == [True] * 3


def test_no_method_is_named_below_the_plugins():
    assert methods() == {"awq"} | {folder.name for folder in (ROOT / "plugins/pronghorn").glob("[a-z]*")}
    # `llm-awq` and `AutoAWQ` are other projects, and named as sources.
    pattern = re.compile("|".join(rf"(?<![a-z-]){name}(?![a-z])" for name in methods()), re.IGNORECASE)
    found = []
    for path in tracked_python():
        if not path.is_relative_to(ROOT / "plugins"):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
                for number, line in enumerate(path.read_text().splitlines(), 1)
                if pattern.search(line)
            ]
    assert found == []


def test_no_forbidden_file_names():
    assert [str(path) for path in tracked_python() if path.stem in FORBIDDEN_NAMES] == []


def test_supported_versions_equal_the_extras():
    from packaging.requirements import Requirement

    from pronghorn.versions import PYTHON, SUPPORTED

    extras = {
        extra: {
            requirement.name: requirement.specifier
            for requirement in map(Requirement, PYPROJECT["project"]["optional-dependencies"][extra])
        }
        for extra in SUPPORTED
    }
    from packaging.specifiers import SpecifierSet

    assert {name: extras[name][name] for name in SUPPORTED} == {n: SpecifierSet(s) for n, s in SUPPORTED.items()}
    markers = {
        requirement.name: str(requirement.marker)
        for extra in SUPPORTED
        for requirement in map(Requirement, PYPROJECT["project"]["optional-dependencies"][extra])
        if requirement.name == extra and requirement.marker is not None
    }
    pythons = {name: f'python_version >= "{python.removeprefix(">=")}"' for name, python in PYTHON.items()}
    assert markers == pythons
