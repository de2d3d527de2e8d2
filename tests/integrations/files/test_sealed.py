"""Seals written anew: by hand, with the usual files, of a folder that was sealed with more than those."""

import json

import pytest
from typer.testing import CliRunner

from pronghorn.cli import app
from pronghorn.files.json_files import save_json
from pronghorn.files.sealed import INDEX, SEALED, check_seal, seal


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose method seals files of its own."""
    (tmp_path / "method").mkdir()
    for name in ("config.json", "model.safetensors", "method/a.tsv", "method/b.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    seal(tmp_path, (*SEALED, "method/*"))
    return tmp_path


def sealed(folder):
    return set(json.loads((folder / INDEX).read_text())["files"])


def by_hand(folder):
    done = CliRunner().invoke(app, ["seal", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", ["config.json", "method/a.tsv"])
def test_by_hand_what_was_sealed_stays_sealed(folder, name):
    before = sealed(folder)
    assert before == {"config.json", "model.safetensors", "method/a.tsv", "method/b.json"}
    (folder / name).write_text("changed on purpose")
    with pytest.raises(ValueError, match=name):
        check_seal(folder)
    by_hand(folder)
    assert sealed(folder) == before
    assert check_seal(folder)
    (folder / "method" / "b.json").write_text("damaged")
    with pytest.raises(ValueError, match=r"b\.json: damaged or changed"):
        check_seal(folder)


def test_what_was_removed_or_added_on_purpose(folder):
    (folder / "method" / "a.tsv").unlink()
    (folder / "model-2.safetensors").touch()
    by_hand(folder)
    assert sealed(folder) == {"config.json", "model.safetensors", "model-2.safetensors", "method/b.json"}
    assert check_seal(folder)


@pytest.mark.fault(1)
@pytest.mark.parametrize("damage", ["cut off", "leads out", "changed"])
def test_a_damaged_index_is_made_anew(folder, damage, caplog):
    """What it had beside the usual files is not known, which is told; and nothing outside is ever read."""
    path = folder / INDEX
    (folder.parent / "secret").write_text("outside")
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "leads out":
        save_json(path, {"files": {"../secret": "0" * 64}}, format=2)
    else:
        path.write_text(path.read_text().replace("a.tsv", "c.tsv"))
    by_hand(folder)
    assert "what was sealed before is not known" in caplog.text
    assert sealed(folder) == {"config.json", "model.safetensors"}
    assert check_seal(folder)
