"""What is installed and what of it works: `pronghorn list` and `pronghorn info`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from pronghorn.methods import (
    DISABLE,
    ECOSYSTEMS,
    installed_methods,
    is_disabled,
    load_rooms,
    register_all,
    ships_to,
    unavailable,
)
from pronghorn.versions import obstacle, remedy, versions

LIBRARIES = ("torch", "triton", "transformers", "vllm", "diffusers", "trl", "peft", "lerobot")


def print_methods() -> None:
    """A table of methods by ecosystems; nothing is loaded. What is in no ecosystem is used in torch itself."""
    packages = installed_methods()
    ships = {
        ecosystem: [method for method, package in packages.items() if ships_to(method, package, ecosystem)]
        for ecosystem in ECOSYSTEMS
    }
    table = Table("method", *ECOSYSTEMS, "torch")
    for method in packages:
        cells = []
        for ecosystem in ECOSYSTEMS:
            if method not in ships[ecosystem]:
                cells.append("")
            elif is_disabled(method):
                cells.append(f"disabled by {DISABLE}")
            else:
                cells.append("no" if obstacle(ecosystem) else "yes")
        table.add_row(method, *cells, "" if any(cells) else "yes")
    console = Console()
    console.print(table)
    for ecosystem in ECOSYSTEMS:
        if ships[ecosystem] and obstacle(ecosystem):
            console.print(f"{ecosystem}: {obstacle(ecosystem)}", markup=False, soft_wrap=True)


def print_info(as_json: bool) -> None:
    """Everything a bug report needs."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201 - plain, for other programs to read
        return
    console = Console()
    libraries = "  ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(f"pronghorn {found['pronghorn']}  python {found['python']}  {libraries}", soft_wrap=True)
    console.print(f"devices: {', '.join(found['devices'])}", markup=False)
    table = Table("method", "ecosystem", "from", "state")
    for plugin in found["plugins"]:
        table.add_row(*(plugin[key] for key in ("method", "ecosystem", "distribution", "state")))
    console.print(table)
    for plugin in found["plugins"]:
        if plugin["reason"]:
            mending = f"; to mend it: {plugin['remedy']}" if plugin["remedy"] else ""
            line = f"{plugin['method']} in {plugin['ecosystem']}: {plugin['reason']}{mending}"
            console.print(line, markup=False, soft_wrap=True)


def collect() -> dict[str, Any]:
    """Versions, devices and the outcome of loading every plugin, as JSON."""
    plugins = []
    with contextlib.redirect_stdout(sys.stderr):  # what plugins and libraries print while they load is not the report
        for ecosystem in ECOSYSTEMS:
            command = remedy(ecosystem)
            reason = obstacle(ecosystem).removesuffix(f": {command}")
            found = unavailable(ecosystem, reason, command) if reason else register_all(ecosystem)
            plugins += [dataclasses.asdict(outcome) for outcome in found]
        plugins += [dataclasses.asdict(outcome) for outcome in load_rooms()]
    return {
        "pronghorn": importlib.metadata.version("pronghorn"),
        "python": platform.python_version(),
        "versions": versions(LIBRARIES),
        "devices": _devices(),
        "plugins": plugins,
    }


def _devices() -> list[str]:
    cpu = f"cpu ({platform.machine()})"
    if importlib.util.find_spec("torch") is None:
        return [cpu]
    import torch

    gpus = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    return [*gpus, cpu]
