"""What every method owes its users: one matrix over all that are installed, from this distribution or any other.

Methods say themselves what to try it with, and what is not theirs and why: `pronghorn.contract.Contract`.
PRONGHORN_CONTRACT, a list of names with commas, restricts it to some.
"""

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.plugins.host_state import changes, state
from torch._dynamo.testing import CompileCounterWithBackend

from pronghorn.contract import CHECKS, Contract
from pronghorn.kernels._operation import relative_error
from pronghorn.methods import ECOSYSTEMS, entry_points, installed_methods
from pronghorn.versions import obstacle

SOURCES = Path(__file__).parents[2] / "plugins" / "pronghorn"
CHOSEN = os.environ.get("PRONGHORN_CONTRACT")
PACKAGES = {name: package for name, package in installed_methods().items() if not CHOSEN or name in CHOSEN.split(",")}
COMPILED = 1e-6  # operations that are compiled may add in another order
BATCHES = (2, 3, 5, 7, 11)


each_method = pytest.mark.parametrize("method", PACKAGES)


def contract(method, check=None):
    """A method's own part; skips where that holds a reason against a check."""
    found = {entry.name: entry for entry in entry_points("contract")}
    assert method in found, f"{method} has no entry point in pronghorn.contract"
    part = found[method].load()
    if check is not None:
        assert check in CHECKS
        if check in part.exceptions:
            pytest.skip(f"{method}, {check}: {part.exceptions[check]}")
    return part


@each_method
def test_it_says_what_to_try_it_with(method):
    assert isinstance(contract(method), Contract)


def test_no_method_of_this_repository_is_left_out():
    folders = {path.name for path in SOURCES.glob("[a-z]*") if path.is_dir()}
    assert bool(CHOSEN) or folders <= set(PACKAGES)


@each_method
def test_the_face_is_quick_and_imports_no_torch(method):
    contract(method, "face")
    code = (
        f"import time, sys; start = time.perf_counter(); import {PACKAGES[method]};"
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds, torch = min(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    )
    assert float(seconds) < 0.2
    assert torch == "False"


@each_method
def test_the_face_keeps_its_promises(method):
    contract(method, "face")
    face = importlib.import_module(PACKAGES[method])
    assert face.__doc__
    for name in face.__all__:
        assert getattr(face, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = face.nothing_of_that_name


def configurations(method):
    room = importlib.import_module(f"{PACKAGES[method]}.config")
    kinds = [
        value for value in vars(room).values() if dataclasses.is_dataclass(value) and value.__module__ == room.__name__
    ]
    assert kinds
    return kinds


@each_method
def test_the_configuration_survives_json(method):
    contract(method, "configuration")
    for kind in configurations(method):
        config = kind()
        assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        names = {field.name for field in dataclasses.fields(kind)}
        assert all(f"{name}:" in kind.__doc__ for name in names), names


@pytest.mark.fault(3)
@each_method
@pytest.mark.parametrize("value", [object(), float("nan")], ids=["object", "nan"])
def test_the_configuration_rejects_what_is_no_value(method, value):
    """Every knob, save those that take anything, names itself when it is given something else."""
    contract(method, "configuration")
    for kind in configurations(method):
        for field in dataclasses.fields(kind):
            if field.type != "Any":
                with pytest.raises((ValueError, TypeError), match=field.name):
                    kind(**{field.name: value})


@pytest.mark.fault(3)
@each_method
def test_the_configuration_rejects_what_it_does_not_know(method):
    contract(method, "unknown settings")
    for kind in configurations(method):
        with pytest.raises((ValueError, TypeError), match="nothing_of_that_name"):
            kind.from_dict({**json.loads(json.dumps(kind().to_dict())), "nothing_of_that_name": 1})


@pytest.mark.parametrize("ecosystem", ECOSYSTEMS)
def test_the_users_switch(ecosystem):
    ships = {entry.name for entry in entry_points(ecosystem) if entry.name in PACKAGES}
    code = (
        "from pronghorn.methods import register_all;"
        f"print(sorted((o.method, o.state) for o in register_all({ecosystem!r}) if o.method in {ships!r}))"
    )
    env = {**os.environ, "PRONGHORN_DISABLE": ",".join(PACKAGES)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    # What is imported may write before it: vLLM tells of a Triton without a GPU.
    assert found.strip().splitlines()[-1] == str([(method, "disabled") for method in sorted(ships)])


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("method", "ecosystem"),
    [
        (entry.name, ecosystem)
        for ecosystem in ECOSYSTEMS
        for entry in entry_points(ecosystem)
        if entry.name in PACKAGES
    ],
)
def test_registering_again_is_a_no_op(method, ecosystem):
    if obstacle(ecosystem):
        pytest.skip(f"{method} ships to {ecosystem}, which is not in this environment")
    contract(method, "registration")
    (entry,) = [entry for entry in entry_points(ecosystem) if entry.name == method]
    register = entry.load()
    register()
    register()  # by which vLLM may import more of itself, which registers that
    before = state(ecosystem)
    assert before
    register()
    assert changes(before, state(ecosystem)) == []


def test_a_registration_that_is_no_no_op_is_seen():
    """In a dict of a module, in one of an object there, and as a name of a class."""
    import transformers

    before = state("transformers")
    attentions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    quantizers = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
    kind = transformers.quantizers.HfQuantizer
    try:
        attentions.register("nothing_of_that_name", print)
        quantizers["nothing_of_that_name"] = print
        kind.nothing_of_that_name = print
        found = {place[-2:] for place in changes(before, state("transformers"))}
    finally:
        del attentions._global_mapping["nothing_of_that_name"], quantizers["nothing_of_that_name"]
        del kind.nothing_of_that_name
    assert {("AUTO_QUANTIZER_MAPPING", "nothing_of_that_name"), ("HfQuantizer", "nothing_of_that_name")} <= found
    assert ("_global_mapping", "nothing_of_that_name") in found
    assert changes(before, state("transformers")) == []


@pytest.fixture(scope="session")
def made():
    """A method's module and what it computes, made once; others must not change it."""
    kept = {}

    def make(method, check):
        part = contract(method, check)
        if method not in kept:
            module = part.module(0)
            kept[method] = part, module, part.run(module)
            assert kept[method][2].isfinite().all()
            assert not torch.equal(kept[method][2], part.run(part.module(1))), "the module's numbers have no effect"
        return kept[method]

    return make


def same_state(module, other):
    """Whether two modules have the same state, key by key and bit by bit."""
    one, two = module.state_dict(), other.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@each_method
def test_what_is_loaded_is_what_was_saved(method, made, tmp_path):
    part, module, wanted = made(method, "save and load")
    part.save(module, tmp_path)
    loaded = part.load(tmp_path)
    assert same_state(loaded, module)
    assert torch.equal(part.run(loaded), wanted)


@pytest.mark.fault(20)
@each_method
def test_a_copy_is_one(method, made):
    part, module, wanted = made(method, "deepcopy")
    copied = copy.deepcopy(module)
    assert torch.equal(part.run(copied), wanted)
    ours, theirs = (
        {tensor.data_ptr() for tensor in one.state_dict().values() if tensor.numel()} for one in (module, copied)
    )
    assert not ours & theirs


@each_method
def test_a_new_module_takes_the_state_of_another(method, made):
    part, module, wanted = made(method, "state dict")
    other = part.module(1)
    assert not same_state(other, module)
    other.load_state_dict(module.state_dict())
    assert same_state(other, module)
    assert torch.equal(part.run(other), wanted)


@pytest.mark.fault(21)
@each_method
def test_computed_again_it_has_the_same_bits(method, made):
    """Also where torch refuses what is not deterministic."""
    part, module, wanted = made(method, "repeats")
    assert torch.equal(part.run(module), wanted)
    torch.use_deterministic_algorithms(True)
    try:
        one, other = part.run(module), part.run(module)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(one, other)
    assert relative_error(one, wanted) <= COMPILED


@pytest.mark.fault(22)
@each_method
def test_modules_in_threads_compute_what_each_does_alone(method, made):
    part, module, wanted = made(method, "repeats")
    other = part.module(1)
    expected = [wanted, part.run(other)] * 8
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(part.run, [module, other] * 8))
    assert all(map(torch.equal, found, expected))


@pytest.mark.fault(22)
def test_after_a_fork_all_compute_the_same():
    """In one process, whose import of all libraries takes most of the time."""
    methods = [method for method in PACKAGES if "repeats" not in contract(method).exceptions]
    assert run_as_program(__file__, *methods) == dict.fromkeys(methods, 0)


def forked(method):
    """The wait status of a fork of this process that computes again what this one did."""
    part = contract(method)
    module = part.module(0)
    wanted = part.run(module)

    def again():
        assert torch.equal(part.run(module), wanted)
        assert torch.equal(part.run(part.module(0)), wanted)

    return in_a_fork(again)


@pytest.mark.fault(20)
@each_method
def test_it_compiles_to_one_graph(method, made):
    part, module, wanted = made(method, "compile")
    counted = CompileCounterWithBackend("aot_eager")
    found = part.run(torch.compile(module, fullgraph=True, backend=counted))
    assert counted.frame_count == 1
    assert relative_error(found, wanted) <= COMPILED


def contract_of_batches(method):
    """A method's own part; skips where the method leaves batches out, as the contract lets it."""
    part = contract(method, "compile")
    if part.batches is None:
        pytest.skip(f"{method} says nothing of batches")
    return part


@pytest.mark.fault(20)
@each_method
def test_batches_of_other_sizes_compile_once_more(method):
    part = contract_of_batches(method)
    torch.compiler.reset()  # another test's compilations would count
    module, counted = part.module(0), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counted)
    for size in BATCHES:
        found = part.batches(compiled, size)
        assert len(found) == size
        assert relative_error(found, part.batches(module, size)) <= COMPILED
    assert counted.frame_count <= 2


def given_to(module, call):
    """The arguments with which `call` calls a module."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    call(module)
    hook.remove()
    return seen[0]


@pytest.mark.fault(20)
@each_method
def test_it_is_exported(method, made):
    part, module, wanted = made(method, "compile")
    exported = torch.export.export(module, *given_to(module, part.run)).module()
    assert relative_error(part.run(exported), wanted) <= COMPILED


@pytest.mark.fault(20)
@each_method
def test_batches_of_all_sizes_are_exported_at_once(method):
    part = contract_of_batches(method)
    module = part.module(0)
    tensors, named = given_to(module, lambda called: part.batches(called, BATCHES[0]))
    sizes = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
    exported = torch.export.export(module, tensors, named, dynamic_shapes=sizes).module()
    for size in BATCHES:
        assert relative_error(part.batches(exported, size), part.batches(module, size)) <= COMPILED


if __name__ == "__main__":
    torch.set_num_threads(1)  # those of a library do not come along into a fork
    sys.stdout.write(json.dumps({method: forked(method) for method in sys.argv[1:]}) + "\n")
