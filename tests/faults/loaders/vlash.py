"""VLASH's sweeps, policies and messages: tiny files of each, and how they are read."""

from types import SimpleNamespace
from typing import Any

from tests.faults.loaders.table import loader, tensors


def _task():
    return SimpleNamespace(name="tracking", about=lambda: {"steps": 3})


@loader("vlash sweep", "rows.json")
class VlashSweep:
    @staticmethod
    def write(folder):
        from dataclasses import MISSING, fields

        from pronghorn.vlash.sweep import SweepRow, write_rows

        given: dict[str, Any] = {"mode": "vlash", "delay": 2, "seed": 0}
        wanted = {field.name: given.get(field.name, 0.5) for field in fields(SweepRow) if field.default is MISSING}
        write_rows(folder / "rows.json", _task(), [SweepRow(**wanted)])

    @staticmethod
    def read(folder):
        from pronghorn.vlash.sweep import read_rows

        return [row.to_dict() for row in read_rows(folder / "rows.json", _task())]


@loader("vlash trained policy", "tracking-plain-1-0.safetensors")
class VlashTracking:
    @staticmethod
    def write(folder):
        VlashTracking.read(folder)

    @staticmethod
    def read(folder):
        from pronghorn.vlash.tracking import TrackingTask

        return tensors(TrackingTask(folder=folder, train_steps=1).policy("plain", 0))


@loader("vlash message", "request.bin", unnamed=("request.bin",))
class VlashMessage:
    @staticmethod
    def write(folder):
        from tests.plugins.vlash.remote_calls import request_of

        from pronghorn.vlash.remote.messages import pack_request

        (folder / "request.bin").write_bytes(pack_request(request_of()))

    @staticmethod
    def read(folder):
        from pronghorn.vlash.remote.messages import unpack_request

        found = unpack_request((folder / "request.bin").read_bytes())
        return found.delay, found.state, found.leftover, dict(found.observation.content), found.observation.state
