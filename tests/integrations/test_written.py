"""Checkpoints with their report and seal: a folder has its name when all of it is there."""

import dataclasses
import json

import pytest
import yaml
from tests.faults.fail_at_call import FailAtCall

from pronghorn.checkpoint.card import CARD, Report, write_report
from pronghorn.checkpoint.written import write_checkpoint
from pronghorn.files.sealed import INDEX, check_seal

REPORT = Report(method="M", source=None, library_name="none", recipe={}, figures={}, data="nothing", usage="CHECKPOINT")


def save(folder):
    (folder / "config.json").write_text("{}")


def report(folder):
    assert (folder / "config.json").is_file()
    write_report(folder, REPORT, "made")
    return "said"


def test_the_report_is_sealed_and_the_card_is_the_users(tmp_path):
    folder = tmp_path / "made"
    assert write_checkpoint(folder, save, needed=2, report=report) == "said"
    assert set(json.loads((folder / INDEX).read_text())["files"]) == {"config.json", "quality.json"}
    assert (folder / CARD).read_text().count("made") == 2  # its name, not that of the folder where it was written
    (folder / CARD).write_text("mine")
    assert check_seal(folder)
    (folder / "quality.json").write_text("{}")
    with pytest.raises(ValueError, match=r"quality\.json: damaged or changed"):
        check_seal(folder)


@pytest.mark.fault(8)
def test_without_its_report_or_seal_a_checkpoint_has_no_name(tmp_path, monkeypatch):
    seen = []

    def looking(folder):
        seen.append([path.name.startswith(".made.") for path in tmp_path.iterdir()])
        return report(folder)

    write_checkpoint(tmp_path / "made", save, needed=2, report=looking)
    assert seen == [[True]]
    old = (tmp_path / "made" / "quality.json").read_bytes()
    for failing in ("report", "seal"):
        fails = FailAtCall(report, 1, ValueError(failing))
        given = fails if failing == "report" else report
        if failing == "seal":
            monkeypatch.setattr("pronghorn.checkpoint.written.seal", fails)
        with pytest.raises(ValueError, match=failing):
            write_checkpoint(tmp_path / "made", save, needed=2, report=given, overwrite=True)
        assert fails.fired
        assert (tmp_path / "made" / "quality.json").read_bytes() == old
        assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_took_hours_is_kept_without_its_report(tmp_path):
    fails = FailAtCall(report, 1, ValueError("NaN"))
    with pytest.raises(ValueError, match="NaN"):
        write_checkpoint(tmp_path / "made", save, needed=2, report=fails, in_spite_of=(ValueError,))
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"config.json", INDEX}
    assert check_seal(tmp_path / "made")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A snapshot in the Hub's cache, as a download leaves it: files are links to blobs."""
    repository = tmp_path / "hub" / "models--org--base"
    snapshot, blobs = repository / "snapshots" / ("0a" * 20), repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    files = {"README.md": "---\nlicense: mit\n---\n", "LICENSE": "as you like", "weights.pt": ""}
    for index, (name, content) in enumerate(files.items()):
        (blobs / f"{index:040d}").write_text(content)
        (snapshot / name).symlink_to(blobs / f"{index:040d}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("named", ["a name", "a snapshot", "a file of it", "a link to it"])
def test_a_source_in_the_hubs_cache(cached, tmp_path, named):
    """Its repository is what the card calls it, and its licence comes along."""
    (tmp_path / "link").symlink_to(cached)
    places = {"a snapshot": cached, "a file of it": cached / "weights.pt", "a link to it": tmp_path / "link"}
    (tmp_path / "made").mkdir()
    made = dataclasses.replace(REPORT, source=str(places.get(named, "org/base")))
    write_report(tmp_path / "made", made)
    header = yaml.safe_load((tmp_path / "made" / CARD).read_text().split("---")[1])
    assert (header["base_model"], header["license"]) == ("org/base", "mit")
    copy = tmp_path / "made" / "LICENSE"
    assert copy.read_text() == "as you like"
    assert not copy.is_symlink()


def test_a_licence_that_is_not_known_is_said(cached, tmp_path, caplog):
    (cached / "README.md").unlink()
    for source in ("org/base", "org/other", "no name/of a/repository"):
        write_report(tmp_path, dataclasses.replace(REPORT, source=source))
        assert f"the licence of {source} is not known" in caplog.text
    (cached / "README.md").write_text("---\nlicense: [mit\n---\n")
    write_report(tmp_path, dataclasses.replace(REPORT, source=str(cached)))
    assert f"the licence of {cached} is not known" in caplog.text
    assert "license" not in (tmp_path / CARD).read_text()
