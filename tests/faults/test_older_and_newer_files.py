"""Files of other versions: those of every format that there was give the same bits for ever, newer ones are refused.

`data/format-N/<loader>/` holds what Pronghorn wrote as format N, and `wanted.json` a digest of what is read of it.
Format 1 is from before there were digests. Whoever raises a format runs this file as a program, which adds a folder.
"""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.faults.loaders import LOADERS
from tests.faults.test_loaders import REFUSED, bytes_of, same

DATA = Path(__file__).parent / "data"
TODAY = 2
# Messages live as long as a connection, weights on their way to a server as long as an update; the toy's policies are
# trained anew in a minute.
SHORT_LIVED = ("vlash message", "trl weight transfer", "vlash trained policy")
# The same files as of another entry.
ALIKE = ("awq in vLLM", "awq convert")
KEPT = [name for name in LOADERS if name not in SHORT_LIVED + ALIKE]
LIMIT = 200_000  # bytes of all of them


def text_of(value):
    """What a result is made of, bit by bit, for a digest."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {bytes_of(value).hex()}"
    if is_dataclass(value):
        return text_of({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, dict):
        return str({key: text_of(value[key]) for key in sorted(value, key=str)})
    if isinstance(value, list | tuple):
        return str([text_of(item) for item in value])
    return repr(value)


def digest(value):
    return hashlib.sha256(text_of(value).encode()).hexdigest()


def folder_of(format, name):
    return DATA / f"format-{format}" / re.sub(r"\W+", "-", name)


def stored():
    return [(int(folder.name.removeprefix("format-")), name) for folder in sorted(DATA.glob("format-*"))
            for name in KEPT if folder_of(int(folder.name.removeprefix("format-")), name).is_dir()]  # fmt: skip


def copied(format, name, tmp_path):
    """A loader, and a copy of its stored files, which a reader may add to."""
    shutil.copytree(folder_of(format, name), tmp_path / "files", ignore=shutil.ignore_patterns("wanted.json"))
    return LOADERS[name], tmp_path / "files"


@pytest.mark.fault(19)
def test_every_loader_has_its_files():
    assert {name for format, name in stored() if format == TODAY} == set(KEPT)
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < LIMIT


@pytest.mark.fault(19)
@pytest.mark.parametrize(("format", "name"), stored())
def test_older_files_give_the_same_bits(tmp_path, format, name):
    entry, folder = copied(format, name, tmp_path)
    wanted = json.loads((folder_of(format, name) / "wanted.json").read_text())["digest"]
    assert digest(entry.read(folder)) == wanted


def as_newer(path):
    """Let a file say that it is of the next format; False where it says none."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "pronghorn" not in metadata:
            return False
        mark = {**json.loads(metadata["pronghorn"]), "format": TODAY + 1}
        save_file(load_file(path), path, metadata={"pronghorn": json.dumps(mark)})
        return True
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        torch.save({**content, "format": TODAY + 1}, path)
        return True
    if path.suffix != ".json":
        return False
    text = path.read_text()
    newer = text.replace(f'"format": {TODAY}', f'"format": {TODAY + 1}')
    path.write_text(newer)
    return newer != text


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", KEPT)
def test_newer_files_are_refused(tmp_path, name):
    """By the number of their format, before anything else is said of them."""
    entry, folder = copied(TODAY, name, tmp_path)
    wanted = entry.read(folder)
    fired = 0
    for path in entry.paths(folder):
        clean = path.read_bytes()
        if (as_newer(path) and not (folder / "pronghorn.json").exists()) or path.name == "pronghorn.json":
            fired += 1
            with pytest.raises(REFUSED, match=f"format {TODAY + 1}, this is {TODAY}"):
                entry.read(folder)
        path.write_bytes(clean)
    assert same(entry.read(folder), wanted)
    assert fired or name in ("dcae latents", "vcpo records")  # arrays of NumPy's, and lines that name their keys


def write(format):
    for name in KEPT:
        folder = folder_of(format, name)
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        LOADERS[name].write(folder)
        found = {"digest": digest(LOADERS[name].read(folder))}
        (folder / "wanted.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    write(int(sys.argv[1]))
