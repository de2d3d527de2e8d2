"""Finds the installed methods, by entry point, and registers them with an ecosystem.

A method ships to an ecosystem by one entry point in the group `pronghorn.<ecosystem>`, from this distribution or any
other. One that fails is reported by name, with its reason, and breaks nothing else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Literal

from pronghorn.process_state import kept
from pronghorn.versions import obstacle

logger = logging.getLogger(__name__)

ECOSYSTEMS = ("transformers", "vllm", "diffusers", "lerobot", "trl")
ROOMS = ("cli", "verify", "check", "contract")  # of a method, that our commands and tests load
GROUPS = (*ECOSYSTEMS, *ROOMS)
DISABLE = "PRONGHORN_DISABLE"
SLOW = 20.0  # seconds; importing an ecosystem's library takes several

_lock = threading.Lock()
_tried: set[tuple[str, str]] = set()
_outcomes: dict[tuple[str, str], Outcome] = {}


@dataclass(frozen=True)
class Outcome:
    """What became of one method in one ecosystem.

    Attributes:
        method: its entry point's name.
        ecosystem: where it ships to.
        distribution: what it came with, and its version.
        state: "loaded", "disabled" by the user, "failed", or "unavailable" where the ecosystem's library is missing
            or of an unsupported version.
        reason: why it is not loaded, or what else is to be said of it.
        remedy: the command that mends it, where there is one.
    """

    method: str
    ecosystem: str
    distribution: str
    state: Literal["loaded", "disabled", "failed", "unavailable"]
    reason: str = ""
    remedy: str = ""


def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    """Entry points of `pronghorn.<group>`, sorted by name; of two with one name the first found counts."""
    found = importlib.metadata.entry_points(group=f"pronghorn.{group}")
    unique: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in found:
        kept = unique.setdefault(entry.name, entry)
        if kept.value != entry.value:
            logger.warning(
                "two plugins are called %r: %s is used, %s is not", entry.name, _origin(kept), _origin(entry)
            )
    return [unique[name] for name in sorted(unique)]


def installed_methods() -> dict[str, str]:
    """The package of every installed method, by the method's name: what holds the rooms that entry points name."""
    found: dict[str, str] = {}
    for group in GROUPS:
        for entry in entry_points(group):
            found.setdefault(entry.name, entry.module.rpartition(".")[0] or entry.module)
    return dict(sorted(found.items()))


def ships_to(method: str, package: str, ecosystem: str) -> bool:
    """Whether a method has an entry point for an ecosystem, or a room to import: some need no registration.

    An import error of its package means no.
    """
    if any(entry.name == method for entry in entry_points(ecosystem)):
        return True
    try:
        return importlib.util.find_spec(f"{package}.{ecosystem}") is not None
    except (Exception, SystemExit):  # noqa: BLE001 - a broken package is reported where it is registered
        return False


def is_disabled(method: str) -> bool:
    """Whether `PRONGHORN_DISABLE`, a comma-separated list, names the method."""
    return method in {name.strip() for name in os.environ.get(DISABLE, "").split(",")}


def register_all(ecosystem: str) -> list[Outcome]:
    """Register every installed method with an ecosystem; each is tried once in a process. Never raises.

    One that another thread is registering is not waited for; `import pronghorn.transformers` waits, as imports do.
    """
    for entry in entry_points(ecosystem):
        key = (ecosystem, entry.name)
        with _lock:
            if key in _tried:
                continue
            _tried.add(key)
        # Not under the lock: a method's register() may come back here, or wait for an import of another thread.
        outcome = _register(ecosystem, entry)
        with _lock:
            _outcomes[key] = outcome
    return outcomes(ecosystem)


def outcomes(ecosystem: str) -> list[Outcome]:
    """What `register_all` found so far."""
    with _lock:
        return [outcome for (where, _), outcome in sorted(_outcomes.items()) if where == ecosystem]


def unavailable(ecosystem: str, reason: str, remedy: str) -> list[Outcome]:
    """The outcomes of an ecosystem that cannot be used here; nothing is loaded or kept."""
    return [
        Outcome(entry.name, ecosystem, _origin(entry), "unavailable", reason, remedy)
        for entry in entry_points(ecosystem)
    ]


def load_rooms() -> list[Outcome]:
    """What came of importing each method where it wants no registration, and the rooms that our commands load.

    Of the latter only those that fail; a method that is in no ecosystem is in torch.
    """
    found = []
    entries = {entry.name: entry for group in GROUPS for entry in entry_points(group)}
    for method, package in installed_methods().items():
        shipped = [ecosystem for ecosystem in ECOSYSTEMS if ships_to(method, package, ecosystem)]
        for ecosystem in shipped:
            if any(entry.name == method for entry in entry_points(ecosystem)):
                continue
            reason = obstacle(ecosystem)
            if reason:
                found.append(Outcome(method, ecosystem, _origin(entries[method]), "unavailable", reason))
            else:
                found.append(_loaded(ecosystem, entries[method], f"{package}.{ecosystem}"))
        if not shipped:
            found.append(_loaded("torch", entries[method], package))
    rooms = [_loaded(f"pronghorn {group}", entry) for group in ROOMS for entry in entry_points(group)]
    return found + [outcome for outcome in rooms if outcome.state == "failed"]


def _loaded(where: str, entry: importlib.metadata.EntryPoint, module: str | None = None) -> Outcome:
    """What came of loading an entry point, or a module of its method."""
    try:
        _ = entry.load() if module is None else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a method does, the others go on
        return _failed(where, entry, error)
    return Outcome(entry.name, where, _origin(entry), "loaded")


def _register(ecosystem: str, entry: importlib.metadata.EntryPoint) -> Outcome:
    origin = _origin(entry)
    if is_disabled(entry.name):
        return Outcome(entry.name, ecosystem, origin, "disabled", f"{DISABLE} names it", f"unset {DISABLE}")
    start = time.perf_counter()
    try:
        with kept() as changed:
            entry.load()()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does, the others go on
        failed = _failed(ecosystem, entry, error)
        logger.warning("%s (%s) is not available in %s: %s", entry.name, origin, ecosystem, failed.reason)
        return failed
    oddities = [f"it changed {what}, which was put back" for what in changed]
    seconds = time.perf_counter() - start
    if seconds > SLOW:
        oddities.append(f"it took {seconds:.0f} s to load")
    reason = "; ".join(oddities)
    if reason:
        logger.warning("%s (%s) is loaded in %s, but %s", entry.name, origin, ecosystem, reason)
    return Outcome(entry.name, ecosystem, origin, "loaded", reason)


def _failed(where: str, entry: importlib.metadata.EntryPoint, error: BaseException) -> Outcome:
    return Outcome(
        entry.name, where, _origin(entry), "failed", f"{type(error).__name__}: {error}", _remedy(entry, error)
    )


def _remedy(entry: importlib.metadata.EntryPoint, error: BaseException) -> str:
    # pip installs what a distribution lacks even where the distribution is there; other failures are its author's.
    if entry.dist is None or not isinstance(error, ModuleNotFoundError):
        return ""
    return f"pip install {entry.dist.name}"


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    distribution = entry.dist
    return entry.value if distribution is None else f"{distribution.name} {distribution.version}"
