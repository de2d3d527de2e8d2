"""The methods of this repository, among those that are installed."""

from pathlib import Path

from pronghorn.methods import installed_methods

PLUGINS = Path(__file__).parents[1] / "plugins"


def own_methods() -> list[str]:
    """Their names; others come from distributions of their own, and answer for themselves."""
    return [name for name, package in installed_methods().items() if PLUGINS.joinpath(*package.split(".")).is_dir()]
