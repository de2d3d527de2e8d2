"""What every method owes its users, for all entry points of this distribution."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.methods import ECOSYSTEMS, entry_points

METHODS = sorted(
    path.name for path in (Path(__file__).parents[2] / "plugins" / "pronghorn").glob("[a-z]*") if path.is_dir()
)


LAYERS = ("dcae", "torchsparse", "vcpo")  # methods that are imported, and registered nowhere
ELSEWHERE = ("vlash",)  # whose ecosystem is not in this environment; its tests have one


@pytest.mark.parametrize("method", METHODS)
def test_the_face_is_quick_and_imports_no_torch(method):
    code = (
        f"import time, sys; start = time.perf_counter(); import pronghorn.{method};"
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds, torch = min(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    )
    assert float(seconds) < 0.2
    assert torch == "False"


@pytest.mark.parametrize("method", METHODS)
def test_the_face_keeps_its_promises(method):
    face = importlib.import_module(f"pronghorn.{method}")
    assert face.__doc__
    for name in face.__all__:
        assert getattr(face, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = face.nothing_of_that_name


def configurations(method):
    room = importlib.import_module(f"pronghorn.{method}.config")
    kinds = [
        value for value in vars(room).values() if dataclasses.is_dataclass(value) and value.__module__ == room.__name__
    ]
    assert kinds
    return kinds


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_survives_json(method):
    for kind in configurations(method):
        config = kind()
        assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        names = {field.name for field in dataclasses.fields(kind)}
        assert all(f"{name}:" in kind.__doc__ for name in names), names


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_rejects_what_is_no_value(method):
    """Every knob, save those that take anything, names itself when it is given something else."""
    for kind in configurations(method):
        for field in dataclasses.fields(kind):
            if field.type != "Any":
                with pytest.raises((ValueError, TypeError), match=field.name):
                    kind(**{field.name: object()})


@pytest.mark.parametrize("ecosystem", ECOSYSTEMS)
def test_the_users_switch(ecosystem):
    ships = {entry.name for entry in entry_points(ecosystem) if entry.name in METHODS}
    code = (
        "from pronghorn.methods import register_all;"
        f"print(sorted((o.method, o.state) for o in register_all({ecosystem!r}) if o.method in {ships!r}))"
    )
    env = {**os.environ, "PRONGHORN_DISABLE": ",".join(METHODS)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([(method, "disabled") for method in sorted(ships)])


@pytest.mark.parametrize("method", METHODS)
def test_registering_again_is_a_no_op(method):
    found = [
        importlib.import_module(f"pronghorn.{method}.{room}")
        for room in ("transformers", "vllm")
        if importlib.util.find_spec(f"pronghorn.{method}.{room}") is not None
    ]
    assert found or method in LAYERS + ELSEWHERE
    for room in found:
        room.register()
        room.register()
