"""Damaged checkpoints of a policy: refused by name, or loaded as they were written; statistics of the data set too."""

import random

import pytest
import torch
from lerobot.policies.factory import make_policy
from safetensors.torch import load_file, save_file
from tests.faults.corrupt_file import ATTACKS, CorruptFile
from tiny_lerobot import ACT

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy

REFUSED = (ValueError, TypeError, OSError)
FLIPS = 12


@pytest.fixture
def checkpoint(meta, tmp_path):
    """A folder, and the weights that are loaded of it."""
    config = VLASHConfig(base="act", base_config=ACT, device="cpu", n_action_steps=4)
    make_policy(config, ds_meta=meta).save_pretrained(tmp_path)
    assert (tmp_path / "pronghorn.json").is_file()
    return tmp_path, VLASHPolicy.from_pretrained(tmp_path).state_dict()


def sealed(folder):
    files = [*folder.glob("*.safetensors"), *folder.glob("base/*"), folder / "config.json", folder / "pronghorn.json"]
    assert any(path.parent.name == "base" and path.suffix == ".safetensors" for path in files)  # the statistics
    return [CorruptFile(path, seed) for seed, path in enumerate(sorted(files))]


@pytest.mark.fault(1)
def test_hostile_files_are_refused_by_name(checkpoint, figure):
    """Every attack on some file, and some on every file: a load of this policy is not quick."""
    folder, _ = checkpoint
    count, made, files = 0, set(), sealed(folder)
    for number, file in enumerate(files):
        for attack in list(ATTACKS)[number :: len(files)]:
            file.attack(attack)
            made.add(attack)
            with pytest.raises(REFUSED, match=file.path.name):
                VLASHPolicy.from_pretrained(folder)
        count += file.count
        file.restore()
    VLASHPolicy.from_pretrained(folder)
    assert made == set(ATTACKS)
    figure("header attacks", count)


@pytest.mark.fault(1)
@pytest.mark.parametrize("flips", [FLIPS, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found(checkpoint, figure, flips):
    folder, wanted = checkpoint
    files, chosen, refused = sealed(folder), random.Random(0), 0  # noqa: S311 - no secret
    for _ in range(flips):
        file = chosen.choice(files)
        before = file.count
        file.flip()
        assert file.count == before + 1
        try:
            found = VLASHPolicy.from_pretrained(folder).state_dict()
        except REFUSED:
            refused += 1
        else:
            assert all(torch.equal(found[name], weight) for name, weight in wanted.items()), file.path
        file.restore()
    assert refused
    figure("byte flips", flips)


@pytest.mark.fault(2)
@pytest.mark.parametrize("kind", ["missing", "renamed", "extra", "shape", "NaN"])
def test_a_weight_that_is_not_as_it_should_be_is_named(checkpoint, kind):
    """In a checkpoint without a seal, as one of another program."""
    folder, _ = checkpoint
    (folder / "pronghorn.json").unlink()
    path = folder / "model.safetensors"
    content = load_file(path)
    VLASHPolicy.from_pretrained(folder)
    for name in list(content)[:: len(content) // 2]:
        changed = {
            "missing": {}, "renamed": {name + "_": content[name]}, "shape": {name: content[name].reshape(1, -1)},
            "extra": {name: content[name], name + "_": content[name].clone()},
            "NaN": {name: torch.full_like(content[name], float("nan"))},
        }[kind]  # fmt: skip
        rest = {other: weight for other, weight in content.items() if other != name}
        save_file({**rest, **changed}, path)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            VLASHPolicy.from_pretrained(folder)
