"""Environments and what runs in them; `make` calls this.

Environments live outside the clone, in a folder named by the digest of their requirements, so that clones and CI runs
share them. What belongs to this clone, its source roots and its entry points, comes in through PYTHONPATH.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import nox

ROOT = Path(__file__).parent
CACHE = Path(
    os.environ.get("PRONGHORN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pronghorn"
)
# The second is what LeRobot finds by its name, with one module; where LeRobot is not, nobody imports it.
PROJECTS = [ROOT, ROOT / "integrations" / "lerobot_policy_pronghorn"]
SOURCES = [*(ROOT / name for name in ("kernels", "integrations", "plugins")), PROJECTS[1]]
TORCH = {"main": "torch==2.13.0", "oldest": "torch==2.11.0", "lerobot": "torch==2.11.0"}
ADVISORIES = "https://pypi.org/pypi/pip/24.0/json"  # of one release, as pip-audit asks for it
SIDE_BY_SIDE = ["-n", "2", "--dist", "loadgroup"]  # of pytest: its tests on two cores
KEEP = ["--reliability=benchmarks/results/reliability-cpu.json"]  # what docs/reliability.md is written from
LEROBOT_TESTS = ["tests/integrations/lerobot", *map(str, sorted(Path("tests/plugins").glob("*/lerobot")))]

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "test"]


def environment(session: nox.Session, name: str, python: str = sys.executable) -> dict[str, str]:
    """Build the environment unless it is there, and return what programs need to run in it."""
    requirements = ROOT / "requirements" / f"{name}.txt"
    key = f"{TORCH[name]}\n{Path(python).resolve()}\n{requirements.read_text()}"
    home = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    ready = home / "ready"
    if not ready.exists():
        session.log(f"building {home}, which takes some minutes, once")
        shutil.rmtree(home, ignore_errors=True)  # what an interrupted build left
        home.parent.mkdir(parents=True, exist_ok=True)
        session.run(python, "-m", "venv", str(home), external=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--progress-bar", "off"]
        # torch by itself and with what it needs, which differs between its CPU and CUDA builds; the rest is a lock.
        session.run(*pip, TORCH[name], external=True)
        session.run(*pip, "--no-deps", "-r", str(requirements), external=True)
        ready.touch()
    return {**variables(session, home)}


def variables(session: nox.Session, home: Path) -> dict[str, str]:
    """PATH and PYTHONPATH for an environment and this clone."""
    described = b"".join((project / "pyproject.toml").read_bytes() for project in PROJECTS)
    site = ROOT / ".pronghorn" / f"{home.name}-{hashlib.sha256(described).hexdigest()[:12]}"
    if not (site / "ready").exists():
        shutil.rmtree(site, ignore_errors=True)
        # Editable installs into a folder of this clone: their metadata hold names and entry points.
        editable = [word for project in PROJECTS for word in ("--editable", str(project))]
        session.run(
            str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--ignore-requires-python", "--target", str(site), *editable, external=True, silent=True,
        )  # fmt: skip
        (site / "ready").touch()
    return {
        "PATH": os.pathsep.join([str(site / "bin"), str(home / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, [*SOURCES, site])),
        "HF_HUB_OFFLINE": "1",
    }


def run(session: nox.Session, env: dict[str, str], program: str, *arguments: str) -> None:
    """Run a program of an environment; nox by itself looks for it on its own PATH."""
    session.run(str(shutil.which(program, path=env["PATH"])), *arguments, env=env, external=True)


def one_thread() -> dict[str, str]:
    """Two test processes share two cores."""
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@nox.session
def test(session: nox.Session) -> None:
    """The test suite without what is marked slow; LeRobot's part of it follows, in its own environment."""
    env = {**environment(session, "main"), **one_thread()}
    if not session.posargs:
        session.notify("lerobot")
    arguments = session.posargs or [*SIDE_BY_SIDE, "-m", "not slow"]
    run(session, env, "python", "-m", "pytest", "-q", *arguments)


@nox.session
def lerobot(session: nox.Session) -> None:
    """The tests of what ships to LeRobot, with the real one, which wants a Python and libraries of its own."""
    python = _python_312()
    if python is None:
        session.skip("LeRobot needs Python 3.12; none was found on PATH or under pyenv")
    env = {**environment(session, "lerobot", python), **one_thread()}
    arguments = session.posargs or [*SIDE_BY_SIDE, "-m", "not slow"]
    run(session, env, "python", "-m", "pytest", "-q", *LEROBOT_TESTS, *arguments)


@nox.session
def nightly(session: nox.Session) -> None:
    """All tests, with random examples, and the pages in a browser; what was proved is kept for the docs."""
    if not shutil.which("chromium") and shutil.which("apt-get") and os.geteuid() == 0:
        # A browser is no Python package. Without one its tests are skipped, and say so.
        session.run("apt-get", "install", "-y", "-q", "chromium", external=True, silent=True, success_codes=[0, 100])
    env = {**environment(session, "main"), **one_thread(), "HYPOTHESIS_PROFILE": "nightly"}
    session.notify("alone")
    session.notify("lerobot", posargs=[*SIDE_BY_SIDE, *KEEP])
    run(session, env, "python", "-m", "pytest", "-q", *SIDE_BY_SIDE, *KEEP, "-m", "not alone", *session.posargs)


@nox.session
def alone(session: nox.Session) -> None:
    """The tests that compare times, one by one."""
    env = {**environment(session, "main"), **one_thread()}
    run(session, env, "python", "-m", "pytest", "-q", *KEEP, "-m", "alone", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests of kernels, plugins and adapters, without slow ones, on the oldest libraries that are supported."""
    python = _python_312()
    if python is None:
        session.error("the oldest environment needs Python 3.12; none was found on PATH or under pyenv")
    env = {**environment(session, "oldest", python), **one_thread()}
    folders = ["tests/kernels", "tests/plugins", "tests/golden", "tests/integrations"]
    run(session, env, "python", "-m", "pytest", "-q", *(session.posargs or [*SIDE_BY_SIDE, "-m", "not slow", *folders]))


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style, types, the direction of imports, and what no source may do."""
    env = environment(session, "main")
    run(session, env, "ruff", "format", "--check", ".")
    run(session, env, "ruff", "check", ".")
    run(session, env, "python", "-m", "mypy")
    run(session, env, "lint-imports")
    run(session, env, "python", "-m", "pytest", "-q", "tests/house/test_security.py")


@nox.session(venv_backend="virtualenv")
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of the locked dependencies; by itself, because it needs PyPI's list of them."""
    try:
        with urlopen(ADVISORIES, timeout=30) as answer:
            json.load(answer)["vulnerabilities"]
    except (OSError, ValueError, KeyError) as error:
        # pip-audit would say of the first dependency that it does not exist.
        session.error(
            f"nothing was audited: {ADVISORIES}, which has what is known of a release, answers {error!r}. Mirrors of "
            "PyPI and proxies often do not pass it on: run this where pypi.org itself can be reached"
        )
    session.install("pip-audit")
    for name, torch in TORCH.items():
        lock = Path(session.create_tmp()) / f"{name}.txt"
        lock.write_text(f"{torch}\n{(ROOT / 'requirements' / lock.name).read_text()}")
        session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", str(lock))


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, strictly."""
    env = environment(session, "main")
    run(session, env, "python", "benchmarks/tables.py", "--check")
    run(session, env, "python", "benchmarks/figures.py", "--check")
    run(session, env, "python", "-m", "tests.plugins.pairs.page", "--check")
    run(session, env, "python", "-m", "mkdocs", "build", "--strict", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """All benchmarks that can run here; tables and JSON."""
    env = environment(session, "main")
    for script in session.posargs or ["correctness.py", "kernels.py"]:
        run(session, env, "python", f"benchmarks/{Path(script).name}")


@nox.session
def tables(session: nox.Session) -> None:
    """Write what README and docs have from results files, the page of pairs and that of reliability."""
    env = environment(session, "main")
    run(session, env, "python", "benchmarks/tables.py")
    run(session, env, "python", "benchmarks/figures.py")
    run(session, env, "python", "-m", "tests.plugins.pairs.page")


@nox.session
def demo(session: nox.Session) -> None:
    """Each method on SmolLM2, LiDAR scans, photographs, sums or targets: what it is for, and whether it does it."""
    env = environment(session, "main")
    for script in sorted((ROOT / "examples" / "demo").glob("*_smollm2.py")):
        run(session, env, "python", str(script), *session.posargs)
    folder = ROOT / "build" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    # What it measures is left there: benchmarks/results holds what was committed.
    measured = {**env, "OUT": str(folder), "OMP_WAIT_POLICY": "passive"}
    for script in ("torchsparse_lidar.py", "dcae_photos.py", "dcae_digits.py", "vcpo_addition.py"):
        run(session, measured, "python", str(ROOT / "benchmarks" / script))
    run(
        session, measured, "pronghorn", "vlash", "sweep", "--seeds", "1", "--train-steps", "1500", "--modes",
        "sync,sync_real_time,naive,rtc,vlash,vlash+delay", "--png", str(folder / "vlash_tracking.png"),
    )  # fmt: skip


def _python_312() -> str | None:
    under_pyenv = sorted(map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python")))
    for candidate in filter(None, [shutil.which("python3.12"), *under_pyenv]):
        # pyenv's shim is on PATH also where that version is not activated, and then does not run.
        if subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    return None
