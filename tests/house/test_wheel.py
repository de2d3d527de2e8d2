"""The wheel holds all three roots and the entry points, and works where it is installed."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([sys.executable, *command, str(ROOT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("pronghorn-*-py3-none-any.whl")
    return path


def test_wheel_holds_every_source_file(wheel):
    sources = {
        str(path.relative_to(ROOT / root))
        for root in ("kernels", "integrations", "plugins")
        for path in (ROOT / root / "pronghorn").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == sources
    assert any(name.endswith(".in") for name in held)  # what `pronghorn new` writes


def test_wheel_installs_and_finds_its_methods(wheel, tmp_path):
    site = tmp_path / "site"
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *command], check=True, timeout=300)
    code = (
        "import pronghorn.methods as m, pronghorn.awq, pronghorn.kernels\n"
        "print(*[f.__file__ for f in (m, pronghorn.awq, pronghorn.kernels)], sep='\\n')\n"
        "print(*[e.name for g in ('transformers', 'vllm', 'cli') for e in m.entry_points(g)])"
    )
    # -S -E: without this clone's paths; the environment's own libraries come last.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    paths = f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path += {libraries!r}\n"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", paths + code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *files, names = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(site) for file in files)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert names.split() == [
        name for group in ("transformers", "vllm", "cli") for name in sorted(entries[f"pronghorn.{group}"])
    ]
