"""Checks an installed library against the versions that an integration supports."""

from __future__ import annotations

import importlib.metadata


def require(library: str, supported: str, extra: str) -> None:
    """Raise ImportError, with the command that mends it, unless a supported version of `library` is installed."""
    from packaging.specifiers import SpecifierSet

    try:
        found = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not SpecifierSet(supported).contains(found, prereleases=True):
        state = "it is not installed" if found is None else f"found {found}"
        raise ImportError(f"pronghorn needs {library} {supported}, {state}: pip install 'pronghorn[{extra}]'")
