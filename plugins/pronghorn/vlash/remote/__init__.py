"""A policy on one machine and its robot on another.

The server computes chunks; what knows of time stays with the robot: the manager, the state estimator, the watchdog.
They speak gRPC, as LeRobot's policy server does, but each message is a safetensors file with a JSON header: nothing
that comes from the network is unpickled. LeRobot's own service is not spoken: it sends pickles both ways, and a request
and its answer are two calls that nothing ties together, so that robots could get each other's actions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.vlash.remote.client import RemotePolicy
    from pronghorn.vlash.remote.container import MessageError
    from pronghorn.vlash.remote.messages import Description
    from pronghorn.vlash.remote.server import PolicyServer

__all__ = ["Description", "MessageError", "PolicyServer", "RemotePolicy"]

_ROOMS = {
    "Description": "messages",
    "MessageError": "container",
    "PolicyServer": "server",
    "RemotePolicy": "client",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
