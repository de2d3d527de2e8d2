"""Checkpoints with their report and seal: a folder has its name when all of it is there."""

import json

import pytest
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
