"""Room on disk: looked for before, and told of by whichever library's error it was that said it ran out."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tests.faults.limited_disk import limited_disk
from tests.plugins.conftest import letters_tokenizer

from pronghorn.files.room import check_target
from pronghorn.files.tensor_files import opened
from pronghorn.files.whole_folders import made_whole

WRITERS = {
    "safetensors": lambda folder: save_file({"a": torch.zeros(9000)}, folder / "a.safetensors"),
    "tokenizers": lambda folder: letters_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json")),
    "torch": lambda folder: torch.save(torch.zeros(9000), folder / "a.pt"),
    "torch, a small file": lambda folder: torch.save(torch.zeros(9), folder / "a.pt"),
    "Python": lambda folder: (folder / "a").write_bytes(bytes(5000)),
}


@pytest.mark.fault(10)
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_has_one_error(name, tmp_path):
    with made_whole(tmp_path / "whole", needed=1) as folder:
        WRITERS[name](folder)
    with (
        limited_disk(1000),
        pytest.raises(
            OSError, match=r"(File too large|Input/output error): 123 bytes are needed, \d+ bytes are free: '.*target'"
        ),
        made_whole(tmp_path / "target", needed=123) as folder,
    ):
        WRITERS[name](folder)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_a_library_says_of_the_system_is_its_error(tmp_path):
    denied = pytest.raises(PermissionError, match=r"Permission denied: '.*target'$")
    with denied as found, made_whole(tmp_path / "target", needed=1):
        raise SafetensorError("I/O error: Permission denied (os error 13)")
    assert "bytes" not in str(found.value), "there is room"


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("no"), FileNotFoundError(2, "gone")):
        with pytest.raises(type(error)) as found, made_whole(tmp_path / "target", needed=1):
            raise error
        assert found.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(10)
def test_a_target_is_tried_before_the_work(tmp_path, monkeypatch):
    check_target(tmp_path / "a" / "b", 1000)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot be made"):
        check_target(tmp_path / "file" / "b")
    with pytest.raises(OSError, match="'/proc/out'"):
        check_target(Path("/proc/out"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    for _ in range(2):
        with (
            pytest.raises(OSError, match="1000 bytes are needed, 10 bytes are free"),
            made_whole(tmp_path / "a", needed=1000),
        ):
            pytest.fail("the work began")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_answers_for_its_own_errors_only(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with opened(path) as file, pytest.raises(ValueError, match=r"a\.safetensors: not a whole"):
        file.get_tensor("b")
    with pytest.raises(Exception, match="serializing") as found, opened(path):
        save_file({"a": torch.zeros(2)}, tmp_path / "no" / "b.safetensors")
    assert not isinstance(found.value, ValueError)
