"""Folders that replace others: the old one stays until the new one has its name, whatever goes wrong."""

from pathlib import Path

import pytest
from tests.faults.fail_at_call import FailAtCall

from pronghorn.files import whole_folders
from pronghorn.files.whole_folders import made_whole


def write(target, text, more="more"):
    with made_whole(target, needed=1, overwrite=True) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(more)


@pytest.fixture
def target(tmp_path):
    write(tmp_path / "target", "old")
    return tmp_path / "target"


@pytest.mark.fault(8)
def test_a_work_that_fails_leaves_the_old_folder(target):
    with pytest.raises(TypeError, match="must be str"):
        write(target, "new", 3)
    assert (target / "a").read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.fault(8)
def test_a_name_that_cannot_be_taken_leaves_the_old_folder(target, monkeypatch):
    """The first renaming puts the old folder aside, the second fails, the third brings it back."""
    rename = FailAtCall(Path.rename, 2, PermissionError("no"))
    monkeypatch.setattr(Path, "rename", lambda path, to: rename(path, to))
    with pytest.raises(PermissionError):
        write(target, "new")
    assert rename.fired
    assert rename.count == 3
    assert (target / "a").read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.fault(8)
def test_a_folder_that_a_killed_run_left_aside_is_in_nobodys_way(target, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(whole_folders.shutil, "rmtree", lambda *_, **__: None)  # as killed before the old one is removed
        write(target, "new")
    assert (target.with_name(".target.replaced") / "a").read_text() == "old"
    write(target, "newest")
    assert (target / "a").read_text() == "newest"
    assert list(target.parent.iterdir()) == [target]
