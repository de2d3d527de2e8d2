"""Hostile configurations: refused by name, nothing they name is run or written, and no memory is asked for."""

import dataclasses
import importlib
import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.faults.loaders import LOADERS
from tests.faults.memory_peak import memory_peak

METHODS = ("awq", "dcae", "duoattention", "torchsparse", "vcpo", "vlash")
REFUSED = (ValueError, TypeError)
MIB = 2**20
SPARE = 200 * MIB
SECONDS = 1.0


def deep(levels=10_000):
    """A list within a list, and so on."""
    found = []
    for _ in range(levels):
        found = [found]
    return found


def configurations():
    for method in METHODS:
        room = importlib.import_module(f"pronghorn.{method}.config")
        for value in vars(room).values():
            if dataclasses.is_dataclass(value) and value.__module__ == room.__name__:
                yield value
    yield importlib.import_module("pronghorn.dcae.diffusion").DiffusionConfig
    yield importlib.import_module("pronghorn.dcae.phases").PhaseConfig


REQUIRED = {"DiffusionConfig": {"steps": 1}, "PhaseConfig": {"steps": 1, "phase": 1}}
KINDS = {kind.__name__: kind for kind in configurations()}
HOSTILE = st.one_of(
    st.sampled_from([10**9, -1, 0, 10**30, math.nan, math.inf, -math.inf, "", "../../x", "os.system", None, True, {}]),
    st.builds(deep),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists, max_leaves=6),
)
STRANGERS = ("auto_map", "trust_remote_code", "_target_", "__class__", "../config.json", "group_sise")


def usual(name):
    """A configuration that is right."""
    return KINDS[name](**REQUIRED.get(name, {}))


def read(kind, values):
    """What a configuration makes of these values: another one, or an error; quickly and with little memory."""
    peak, start = memory_peak(), time.process_time()
    try:
        found = kind.from_dict(values)
    except REFUSED:
        found = None
    assert time.process_time() - start < SECONDS
    assert peak() < SPARE
    return found


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_hostile_values_are_refused_or_none(name, data):
    """A value that is taken is one that JSON keeps: no NaN, no name of code, and the same when it is read again."""
    kind = KINDS[name]
    clean = usual(name).to_dict()
    assert kind.from_dict(clean) == usual(name)  # the unfaulted configuration is read
    field = data.draw(st.sampled_from(sorted(clean)))
    found = read(kind, {**clean, field: data.draw(HOSTILE)})
    if found is not None:
        assert kind.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", KINDS)
def test_each_field_against_the_worst(name, figure):
    kind = KINDS[name]
    clean, refused = usual(name).to_dict(), 0
    for name_of_field in clean:
        for worst in (math.nan, math.inf, -math.inf, deep(), {"auto_map": "x.y"}, [{}]):
            assert read(kind, {**clean, name_of_field: worst}) is None, (name_of_field, type(worst))
            refused += 1
    figure(f"{name}, refused", refused)


@pytest.mark.fault(3)
@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", KINDS)
def test_unknown_settings_are_refused(name, stranger):
    clean = usual(name).to_dict()
    if name == "AwqConfig":
        clean["quant_method"] = "pronghorn_awq"  # published configurations have settings of their own
    with pytest.raises(ValueError, match=stranger):
        KINDS[name].from_dict({**clean, stranger: "x"})


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("values", [None, 5, "x", [["bits", 4]]])
def test_what_is_no_object_is_refused(name, values):
    with pytest.raises(REFUSED):
        KINDS[name].from_dict(values)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantized checkpoint without a seal."""
    folder = tmp_path_factory.mktemp("checkpoint")
    LOADERS["awq in transformers"].write(folder)
    (folder / "pronghorn.json").unlink()
    LOADERS["awq in transformers"].read(folder)  # the unfaulted run passes
    return folder


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("group_size", -32, "group_size: got -32"),
        ("group_size", math.nan, "group_size: got nan"),
        ("bits", 10**9, "bits: got 1000000000"),
        ("version", "../../natural", "version: got"),
        ("modules_to_not_convert", "os.system", "modules_to_not_convert"),
        ("scale_groups", [{"prev": "x"}], "scale_groups"),
        ("search_result", 5, "search_result"),
        ("auto_map", {"AutoConfig": "canary.Config"}, "auto_map"),
    ],
)
def test_a_quantization_configuration_in_a_checkpoint(checkpoint, field, value, named):
    path = checkpoint / "config.json"
    clean = path.read_text()
    config = json.loads(clean)
    config["quantization_config"][field] = value
    path.write_text(json.dumps(config))
    try:
        for name in ("awq in transformers", "awq convert"):
            with pytest.raises(REFUSED, match=named if name != "awq convert" or value == value else "NaN"):
                LOADERS[name].read(checkpoint)
    finally:
        path.write_text(clean)


@pytest.mark.fault(3)
def test_code_that_a_checkpoint_brings_is_not_run(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Config: pass\n"
    path = checkpoint / "config.json"
    clean = path.read_text()
    (checkpoint / "canary.py").write_text(code)
    try:
        path.write_text(json.dumps({**json.loads(clean), "auto_map": {"AutoConfig": "canary.Config"}}))
        LOADERS["awq in transformers"].read(checkpoint)  # of a kind that transformers knows: its own code runs
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "no_such_model"}))
        with pytest.raises((ValueError, OSError)):
            LOADERS["awq in transformers"].read(checkpoint)
    finally:
        path.write_text(clean)
        (checkpoint / "canary.py").unlink()
    assert not canary.exists()


@pytest.mark.fault(3)
def test_a_shard_outside_of_the_folder_is_refused(checkpoint, tmp_path):
    """An index may name `../x.safetensors`; what lies there is not read."""
    path = checkpoint / "model.safetensors.index.json"
    clean = path.read_text()
    index = json.loads(clean)
    first = next(iter(index["weight_map"].values()))
    outside = checkpoint.parent / "outside.safetensors"
    outside.write_bytes((checkpoint / first).read_bytes())
    index["weight_map"] = {
        key: f"../{outside.name}" if file == first else file for key, file in index["weight_map"].items()
    }
    path.write_text(json.dumps(index))
    try:
        with pytest.raises(ValueError, match="names files of other folders"):
            LOADERS["awq in transformers"].read(checkpoint)
    finally:
        path.write_text(clean)
        outside.unlink()


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/../../x"])
def test_a_seal_reads_nothing_outside_of_its_folder(tmp_path, name):
    from pronghorn.files.json_files import save_json
    from pronghorn.files.sealed import check_seal, seal

    (tmp_path / "config.json").write_text("{}")
    seal(tmp_path)
    assert check_seal(tmp_path)
    save_json(tmp_path / "pronghorn.json", {"files": {name: "0" * 64}}, format=2)
    with pytest.raises(ValueError, match=r"pronghorn\.json: damaged"):
        check_seal(tmp_path)


@pytest.mark.fault(3)
@example(text="[" * 10_000)
@example(text='{"a": NaN}')
@example(text='{"a": 1, "a": 2}')
@given(text=st.text(max_size=20))
def test_json_is_an_object_or_an_error(text):
    from pronghorn.files.json_files import parse_json

    try:
        found = parse_json(text, Path("settings.json"))
    except ValueError:
        with pytest.raises(ValueError, match=r"settings\.json"):
            parse_json(text, Path("settings.json"))
    else:
        assert json.loads(json.dumps(found, allow_nan=False)) == found
