"""`pronghorn new`, from the command to a method that is listed, loads, and passes its own tests and the contract."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.cli.new import is_clone, title, write_method
from pronghorn.methods import ECOSYSTEMS

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\w+ title=\"([^\"]+)\"\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOYS = {ecosystem: f"toy_{ecosystem}" for ecosystem in (*ECOSYSTEMS, "torch")}
COMMAND = ("-c", "from pronghorn.cli import main; main()")


def run(*arguments, paths=(), cwd=ROOT, timeout=280, **variables):
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **variables}
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    return found.returncode, found.stdout + found.stderr


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    """A distribution for each ecosystem."""
    folder = tmp_path_factory.mktemp("projects")
    for ecosystem, name in TOYS.items():
        assert write_method(name, ecosystem, folder)
    return folder


@pytest.fixture(scope="module")
def site(projects, tmp_path_factory):
    """They are installed here."""
    target = tmp_path_factory.mktemp("site")
    how = ["--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    code, output = run("-m", "pip", "install", *how, *(projects / f"pronghorn-{name}" for name in TOYS.values()))
    assert code == 0, output
    return target


def test_the_page_shows_what_is_written(tmp_path):
    write_method("toyscale", "transformers", tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "add-a-method.md").read_text())
    assert {name for name, _ in blocks} >= {"pyproject.toml", "src/pronghorn/toyscale/__init__.py"}
    for name, content in blocks:
        assert content == (tmp_path / "pronghorn-toyscale" / name).read_text(), name


def test_they_are_listed_beside_the_others(site):
    code, output = run(*COMMAND, "list", paths=[site])
    assert code == 0, output
    cells = {
        line.split()[1]: [cell.strip() for cell in line.split("│")[2:-1]] for line in output.splitlines() if "│" in line
    }
    columns = [*ECOSYSTEMS, "torch"]
    for ecosystem, name in TOYS.items():
        wanted = "no" if ecosystem == "lerobot" else "yes"
        assert cells[name] == [wanted if column == ecosystem else "" for column in columns]


def test_a_command_works(site):
    code, output = run(*COMMAND, "toy_torch", "check", "2", paths=[site])
    assert code == 0
    assert "factor 2.0 is fine" in output
    code, output = run(*COMMAND, "toy_torch", "check", "0", paths=[site])
    assert code == 1
    assert "Error: factor: got 0.0" in output


@pytest.mark.parametrize(
    "ecosystems",
    [
        pytest.param(["transformers"], id="transformers"),
        pytest.param([*TOYS], id="all", marks=pytest.mark.slow),
    ],
)
def test_they_pass_their_own_tests_and_the_contract(projects, site, ecosystems):
    names = [TOYS[ecosystem] for ecosystem in ecosystems]
    tests = [projects / f"pronghorn-{name}" / "tests" for name in names]
    code, output = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", ROOT / "pyproject.toml",
        "tests/plugins/test_contract.py", *tests, paths=[site], PRONGHORN_CONTRACT=",".join(names),
    )  # fmt: skip
    assert code == 0, output
    assert "failed" not in output
    assert int(re.search(r"(\d+) passed", output)[1]) >= 15 * len(names)
    for name in names:
        assert (projects / f"pronghorn-{name}" / "benchmarks" / f"{name}.py").exists()


def test_its_benchmark_runs(projects, site, tmp_path):
    benchmark = projects / "pronghorn-toy_torch" / "benchmarks" / "toy_torch.py"
    code, output = run(benchmark, paths=[site], cwd=tmp_path)
    assert code == 0, output
    assert "scaled linear" in output


def test_a_name_or_place_that_cannot_be_is_refused(tmp_path):
    for name, ecosystem, reason in (
        *((name, "torch", "small letters") for name in ("Toy", "toy_", "_toy", "toy__two", "2toys", "toy-two", "")),
        *((name, "torch", "Python's own") for name in ("class", "float", "print")),
        *((name, "torch", "is a library") for name in ("typer", "torch", "json")), ("kernels", "torch", "exists"),
        ("methods", "torch", "exists"), ("toy", "jax", "accepted are transformers"),
        *((own, "torch", "a command of Pronghorn's own") for own in ("list", "info", "seal", "verify", "check", "new")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            write_method(name, ecosystem, tmp_path)
    (tmp_path / "pronghorn-toy").mkdir()
    (tmp_path / "pronghorn-toy" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md"):
        write_method("toy", "torch", tmp_path)
    assert [path.name for path in (tmp_path / "pronghorn-toy").iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", ["app", "main", "toy_2"])
def test_a_name_that_its_commands_use_too(name, tmp_path):
    write_method(name, "torch", tmp_path)
    code = f"from pronghorn.{name}.cli import app; app()"
    for arguments, said in ((["check", "2"], "factor 2.0 is fine"), (["--help"], "linear layers whose results")):
        found, output = run("-c", code, *arguments, paths=[tmp_path / f"pronghorn-{name}" / "src"])
        assert found == 0, output
        assert said in output


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what matters of this repository."""
    folder = tmp_path_factory.mktemp("clone")
    left_out = shutil.ignore_patterns("__pycache__", "assets", "results")
    for name in ("kernels", "integrations", "plugins", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("pyproject.toml", "mkdocs.yml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_into_a_clone_two_files_are_edited(clone):
    assert is_clone(clone)
    before = {path: path.read_text() for path in (clone / "pyproject.toml", clone / "mkdocs.yml")}
    existed = {path for path in clone.rglob("*") if path.is_file()}
    for ecosystem, name in TOYS.items():
        written = write_method(name, ecosystem, clone)
        assert existed & set(written) == set(before)
        existed |= set(written)
        assert all(path.is_file() for path in written)
    for path, old in before.items():
        new = path.read_text()
        assert all(name in new and name not in old for name in TOYS.values())
        assert [line for line in old.splitlines() if "modules = [" not in line and "ancestors = [" not in line] == [
            line
            for line in new.splitlines()
            if "toy_" not in line and "Toy" not in line and "modules = [" not in line and "ancestors = [" not in line
        ]
    assert run("-m", "ruff", "format", "--check", ".", cwd=clone)[0] == 0
    code, output = run("-m", "ruff", "check", ".", cwd=clone)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_a_clone_it_passes_what_the_others_pass(clone, tmp_path):
    _written(clone)
    how = ["--quiet", "--no-deps", "--no-build-isolation", "--target", tmp_path, "--editable", clone]
    code, output = run("-m", "pip", "install", *how)
    assert code == 0, output
    paths = [*(clone / source for source in ("kernels", "integrations", "plugins")), tmp_path]
    names = list(TOYS.values())
    own = [f"tests/plugins/{name}" for name in names]
    code, output = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/plugins/test_contract.py", *own,
        "tests/integrations/test_cli.py", "tests/house/test_layout.py::test_no_method_is_named_below_the_plugins",
        "tests/house/test_papers.py::test_every_page_is_in_the_navigation",
        "tests/house/test_papers.py::test_measured_numbers_come_from_results",
        cwd=clone, paths=paths, PRONGHORN_CONTRACT=",".join(names), timeout=900,
    )  # fmt: skip
    assert code == 0, output
    code, output = run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()",
                       cwd=clone, paths=paths)  # fmt: skip
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_a_clone_its_types_hold(clone):
    _written(clone)
    paths = [clone / source for source in ("kernels", "integrations", "plugins")]
    code, output = run("-m", "mypy", *(f"plugins/pronghorn/{name}" for name in TOYS.values()), cwd=clone, paths=paths,
                       timeout=1100)  # fmt: skip
    assert code == 0, output


def _written(clone):
    if not (clone / "plugins/pronghorn/toy_torch").exists():
        for ecosystem, name in TOYS.items():
            write_method(name, ecosystem, clone)


def test_titles():
    assert [title(name) for name in ("toyscale", "toy_scale", "q8")] == ["Toyscale", "ToyScale", "Q8"]
