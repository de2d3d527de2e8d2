"""Damaged files: every loader that we own says so, or gives what was written; never another number in silence."""

import math
import random
import time
from dataclasses import fields, is_dataclass

import pytest
import torch
from tests.faults.corrupt_file import ATTACKS, CorruptFile
from tests.faults.loaders import LOADERS

REFUSED = (ValueError, TypeError, OSError)
FLIPS = 40
SLOW_FLIPS = 8
SECONDS = 1.0


def same(one, other):
    """Whether two results are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and (one.equal(other) or bytes_of(one) == bytes_of(other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def cases():
    return [
        pytest.param(name, marks=[pytest.mark.xdist_group("vllm" if entry.vllm else f"loaders {name}")], id=name)
        for name, entry in LOADERS.items()
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The loader of a name, a folder of its files, and what it reads of them."""
    known = {}

    def found(name):
        entry = LOADERS[name]
        if entry.vllm:
            pytest.importorskip("vllm", reason="the vllm extra is not installed")
        if name not in known:
            folder = tmp_path_factory.mktemp("loader") / "files"
            folder.mkdir()
            torch.manual_seed(0)
            entry.write(folder)
            known[name] = entry, folder, entry.read(folder)
        entry, folder, wanted = known[name]
        assert same(entry.read(folder), wanted)  # the unfaulted run passes
        return entry, folder, wanted

    return found


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", cases())
def test_hostile_files_are_refused_by_name(written, name, figure):
    """Each of 16 attacks on each file that a loader reads: an error within a second that names it."""
    entry, folder, wanted = written(name)
    slowest = 0.0
    for path in entry.paths(folder):
        file = CorruptFile(path)
        for number, attack in enumerate(ATTACKS, 1):
            file.attack(attack)
            assert file.count == number
            start = time.process_time()
            with pytest.raises(REFUSED) as caught:
                entry.read(folder)
            slowest = max(slowest, time.process_time() - start)
            said = str(caught.value)
            named = path.name in said or str(folder) in said
            assert named or any(map(path.match, entry.unnamed)), (attack, said)
        file.restore()
    assert same(entry.read(folder), wanted)
    assert slowest < SECONDS
    figure("header attacks", len(ATTACKS) * len(entry.paths(folder)))


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", cases())
def test_a_flipped_bit_is_found(written, name, figure, caplog):
    count = SLOW_FLIPS if LOADERS[name].slow else FLIPS
    _, warned = damage(*written(name), caplog, count, seed=0)
    figure("byte flips", count)
    figure("warned only", warned)


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.parametrize("name", cases())
def test_two_thousand_flipped_bits_are_found(written, name, figure, caplog):
    refused, warned = damage(*written(name), caplog, 2000, seed=1)
    figure("byte flips", 2000)
    figure("refused", refused)
    figure("warned only", warned)


@pytest.mark.fault(1)
def test_a_configuration_that_does_not_say_quantized_is_only_warned_of(written, caplog):
    """transformers asks us nothing then, not even of a sealed folder; `pronghorn check` finds it."""
    from pronghorn.cli.check import check

    entry, folder, wanted = written("awq in transformers")
    path = folder / "config.json"
    clean = path.read_bytes()
    path.write_bytes(clean.replace(b"quantization_config", b"quantization_confih"))
    assert path.read_bytes() != clean
    try:
        found = entry.read(folder)
        failed = [one.detail for one in check(folder, "transformers") if one.state == "failed"]
    finally:
        path.write_bytes(clean)
    assert not same(found, wanted)
    assert entry.warned(path, caplog.text)
    assert any("config.json" in detail for detail in failed)


def damage(entry, folder, wanted, caplog, count, seed):
    """Flip so many bits one after the other, and cut files as often as each tenth: refused, or read as it was.

    Returns how many were refused, and of how many there was a warning alone.
    """
    files = [CorruptFile(path, seed + number) for number, path in enumerate(entry.paths(folder))]
    chosen = random.Random(seed)  # noqa: S311 - no secret
    refused = warned = 0
    for number in range(count):
        file = chosen.choices(files, [len(file.clean) for file in files])[0]
        before = file.count
        place = file.cut() if number % 10 == 9 else file.flip()
        assert file.count == before + 1  # the injector fired
        caplog.clear()
        try:
            found = entry.read(folder)
        except REFUSED:
            refused += 1
            continue
        except (KeyError, AttributeError):
            assert any(map(file.path.match, entry.unnamed))  # the host's own
            refused += 1
            continue
        finally:
            file.restore()
        if entry.warned(file.path, caplog.text):
            warned += 1
            assert file.path.name == "config.json" or is_beginning(found, wanted)
        else:
            assert same(found, wanted), f"{file.path.name}, byte {place}: another number in silence"
    assert refused
    assert same(entry.read(folder), wanted)
    return refused, warned


def is_beginning(found, wanted):
    """Whether columns are those that were written, and only their end is left out."""
    return same(found, {name: column[: len(found[name])] for name, column in wanted.items()})
