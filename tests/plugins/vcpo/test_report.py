"""Statistics of a run against closed forms, and the files of a report."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.plugins.vcpo.test_records import step_row, trajectory_row

from pronghorn.vcpo import report
from pronghorn.vcpo.diagnosis import (
    Signature,
    by_staleness,
    ess_ratio,
    find_signs,
    heaviest_share,
    hill_tail_index,
    largest_shares,
    recorded_truncation,
    running_median,
    staleness_ranges,
    summarize,
    survival,
    tail_index,
)
from pronghorn.vcpo.records import RunRecords, read_run
from pronghorn.vcpo.report import write_report

PICTURES = ["early_warning.png", "ess_by_staleness.png", "heavy_tails.png"]


def write_run(folder, log_ratios, lags=None, *, truncation=8.0, norms=None, first=1):
    """A run of given log-ratios, a list for each step."""
    records = RunRecords(folder)
    for number, logs in enumerate(log_ratios):
        step, lag = first + number, [0] * len(logs) if lags is None else lags[number]
        found = ess_ratio(np.array(logs)) if np.isfinite(logs).all() else math.nan
        rows = []
        for place, (log, stale) in enumerate(zip(logs, lag, strict=True)):
            ratio = math.exp(log) if log < 700 else math.inf
            rows.append(trajectory_row(
                step + 200, place, int(stale), ratio=ratio, clipped_ratio=min(ratio, truncation), log_ratio=log,
                reward=float(place % 2),
            ))  # fmt: skip
        norm = 0.1 if norms is None else norms[number]
        records.append(
            step_row(step + 200, len(logs), ess_ratio=found, grad_norm=norm, staleness_max=int(max(lag))), rows
        )
    return read_run(folder)


def heavy_run(folder, steps=60, size=24, collapse=40):
    """On-policy at first, then with more and more lag; ratios spread far in the end, and the gradient's norm leaps."""
    random = np.random.default_rng(0)
    lags = [random.integers(0, min(step, 12) + 1, size) for step in range(steps)]
    spread = [0.1 if step < collapse else 3.0 for step in range(steps)]
    logs = [
        (np.sqrt(lag) * scale * random.standard_t(3, size)).tolist() for lag, scale in zip(lags, spread, strict=True)
    ]
    norms = [0.1 if step < collapse + 4 else 2.0 for step in range(steps)]
    return write_run(folder, logs, lags, norms=norms)


def test_ess_ratio_of_hand_made_ratios():
    assert ess_ratio(np.log([1.0, 1.0, 1.0, 1.0])) == pytest.approx(1)
    assert ess_ratio(np.log([1.0, 3.0])) == pytest.approx(16 / 10 / 2)
    assert ess_ratio(np.array([5000.0, 0.0])) == pytest.approx(0.5)
    assert ess_ratio(np.full(7, -4000.0)) == pytest.approx(1)


@given(st.lists(st.floats(-2000, 2000), min_size=1, max_size=20), st.floats(-1000, 1000))
def test_shares_do_not_depend_on_a_common_factor(logs, shift):
    logs = np.array(logs)
    for function in (ess_ratio, heaviest_share):
        assert function(logs + shift) == pytest.approx(function(logs), rel=1e-9)
    assert 1 / len(logs) - 1e-12 <= ess_ratio(logs) <= 1 + 1e-12
    assert 1 / len(logs) - 1e-12 <= heaviest_share(logs, 0) <= 1 + 1e-12


def test_heaviest_share():
    logs = np.log(np.arange(1.0, 201.0))
    assert heaviest_share(logs, 0) == pytest.approx(200 / 20100)
    assert heaviest_share(logs, 0.01) == pytest.approx((200 + 199) / 20100)
    assert heaviest_share(logs, 0.011) == pytest.approx((200 + 199 + 198) / 20100)
    assert heaviest_share(logs, 1) == pytest.approx(1)
    assert heaviest_share(np.array([9000.0, 9000.0, 0.0]), 0) == pytest.approx(0.5)


@pytest.mark.parametrize("index", [0.7, 1.5, 3.0])
def test_hill_finds_the_index_of_a_pareto_distribution(index):
    logs = np.random.default_rng(1).exponential(1 / index, 200_000)  # of ratios that are Pareto with that index
    assert hill_tail_index(logs, 10_000) == pytest.approx(index, rel=0.03)  # three standard errors
    assert tail_index(logs) == hill_tail_index(logs, 10_000)


def test_hill_in_closed_form():
    assert hill_tail_index(np.array([1.0, 0.0, 3.0, 2.0]), 3) == pytest.approx(1 / np.mean([1, 2, 3]))
    assert hill_tail_index(np.array([1.0, 0.0, 3.0, 2.0]) * 1000 + 5e4, 1) == pytest.approx(1 / 1000)
    assert hill_tail_index(np.zeros(50), 10) == math.inf
    assert math.isnan(tail_index(np.arange(180.0)))
    assert tail_index(np.arange(181.0)) == pytest.approx(1 / 5.5)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count: got {count}, wanted a number from 1 to below the 4"):
            hill_tail_index(np.zeros(4), count)


def test_survival():
    values, chances = survival(np.array([2.0, 0.0, 1.0, 1.0, 900.0]))
    assert values.tolist() == [0, 1, 2, 900]
    assert chances.tolist() == pytest.approx([1, 0.8, 0.4, 0.2])
    logs = np.random.default_rng(0).exponential(1.0, 50_000)
    values, chances = survival(logs)
    assert len(values) < 1100
    assert (values[0], values[-1]) == (logs.min(), logs.max())
    assert np.array_equal(values[-100:], np.sort(logs)[-100:])
    for value, chance in zip(values, chances, strict=True):
        assert chance == pytest.approx((logs >= value).mean())


def test_running_median():
    found = running_median(np.array([1.0, 2.0, np.inf, 3.0, 9.0, 8.0]), window=3, fewest=2)
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1.5, 1.5, 2.5, 6.0])
    assert running_median(np.array([]), 5).tolist() == []


def test_signs():
    """A drop of the ESS warns of the next spike within the horizon, not of one in its own step."""
    steps = np.arange(100, 160)
    ess, norm = np.full(60, 0.8), np.full(60, 1.0)
    ess[[20, 30, 50]] = 0.39, 0.41, 0.1
    norm[[24, 50]] = 3.1, np.inf
    signature = Signature(window=10, ess_drop=0.5, norm_spike=3.0, horizon=4)
    found = find_signs(steps, ess, norm, signature)
    assert np.flatnonzero(found.drops).tolist() == [20, 50]
    assert np.flatnonzero(found.spikes).tolist() == [24, 50]
    assert found.warnings == [(20, 24)]
    assert find_signs(steps, ess, norm, Signature(window=10, horizon=3)).warnings == []
    assert find_signs(steps * 2, ess, norm, signature).warnings == []
    assert find_signs(steps, ess, norm, Signature(window=10, horizon=40)).warnings == [(20, 24)]
    ess[45] = math.nan
    assert find_signs(steps, ess, norm, Signature(window=10, horizon=5)).warnings == [(20, 24), (45, 50)]


def test_a_drop_while_the_gradient_leaps_warns_of_nothing():
    steps, ess, norm = np.arange(40), np.full(40, 0.8), np.full(40, 1.0)
    ess[[18, 20, 21, 23]] = 0.1
    norm[[20, 22, 24]] = 9.0
    found = find_signs(steps, ess, norm, Signature(horizon=5))
    assert np.flatnonzero(found.spikes).tolist() == [20, 22, 24]
    assert found.warnings == [(18, 20)]


def test_no_signs_without_a_history():
    ess, norm = np.array([1, 1, 1, 0.01, 0.01]), np.array([1, 1, 1, 1, 99.0])
    found = find_signs(np.arange(5), ess, norm, Signature())
    assert not found.drops.any()
    assert not found.spikes.any()
    still = find_signs(np.arange(9), np.ones(9), np.r_[np.zeros(8), 1.0], Signature())
    assert not still.spikes.any()  # equal rewards give no gradient; what follows is no multiple of nothing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 4}, "window"),
        ({"horizon": 0}, "horizon"),
        ({"ess_drop": 1.0}, "ess_drop"),
        ({"norm_spike": 1.0}, "norm_spike"),
    ],
)
def test_signatures_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Signature(**values)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=300), st.integers(1, 20))
def test_staleness_ranges(staleness, most):
    staleness = np.array(staleness)
    ranges = staleness_ranges(staleness, most)
    assert len(ranges) <= most or len(ranges) == 1
    assert (ranges[0][0], ranges[-1][1]) == (staleness.min(), staleness.max())
    held = [int(((staleness >= low) & (staleness <= high)).sum()) for low, high in ranges]
    assert sum(held) == len(staleness)
    assert all(held)
    if len(np.unique(staleness)) <= most:
        assert ranges == [(value, value) for value in np.unique(staleness)]


def test_staleness_ranges_hold_about_as_many():
    assert staleness_ranges(np.arange(100), 4) == [(0, 24), (25, 49), (50, 74), (75, 99)]


def test_by_staleness(tmp_path):
    logs = [np.log([1.0, 1.0, 16.0]).tolist(), [math.log(3.0), 0.0, 800.0], [math.log(2.0), 0.0, math.nan]]
    run = write_run(tmp_path, logs, [[0, 1, 4], [1, 0, 4], [2, 0, 0]])
    rows = by_staleness(run, staleness_ranges(run.staleness, 9))
    assert [row["staleness"] for row in rows] == [[0, 0], [1, 1], [2, 2], [4, 4]]
    assert [row["trajectories"] for row in rows] == [3, 2, 1, 2]
    assert [row["ess_ratio"] for row in rows] == pytest.approx([1, 0.8, 1, 0.5])
    assert [row["ess_ratio_clipped"] for row in rows] == pytest.approx([1, 0.8, 1, 1])
    assert [row["truncated_share"] for row in rows] == [0, 0, 0, 1]
    assert [row["largest_share"] for row in rows] == pytest.approx([1 / 3, 0.75, 1, 1])
    assert [row["reward"] for row in rows] == pytest.approx([0.5, 0.5, 0, 0])
    assert by_staleness(run, [(5, 9)]) == []
    assert largest_shares(run).tolist() == pytest.approx([16 / 18, 1, 2 / 3])


def test_summary(tmp_path):
    logs = [np.log([1.0, 1.0]).tolist(), np.log([1.0, 3.0]).tolist(), [math.inf, math.log(20.0)]]
    run = write_run(tmp_path, logs, [[0, 0], [0, 2], [1, 1]], truncation=4.0)
    found = summarize(run, truncation=2.0)
    assert (found["steps"], found["first_step"], found["last_step"], found["trajectories"]) == (3, 201, 203, 6)
    assert found["not_finite"] == 1
    assert found["ess_ratio_mean"] == pytest.approx(0.9)  # the third step has none
    assert (found["ess_ratio_min"], found["ess_ratio_min_step"]) == (pytest.approx(0.8), 202)
    assert (found["staleness_mean"], found["staleness_max"]) == (pytest.approx(4 / 6), 2)
    assert (found["truncation"], found["truncated_share"]) == (2.0, pytest.approx(0.4))
    assert found["recorded_truncation"] == recorded_truncation(run) == 4.0
    assert found["log_ratio_max"] == math.log(20.0)
    assert math.isnan(found["tail_index"])
    assert found["heaviest_share"] == pytest.approx(20 / 26)
    assert (found["largest_share"], found["largest_share_step"]) == (1.0, 203)
    assert found["ess_drops"] == found["norm_spikes"] == found["warnings"] == []


def test_nothing_to_summarize(tmp_path):
    RunRecords(tmp_path / "empty")
    with pytest.raises(ValueError, match="the records hold no whole step"):
        summarize(read_run(tmp_path / "empty"))
    with pytest.raises(ValueError, match="the records hold no finite log_ratio"):
        summarize(write_run(tmp_path / "nan", [[math.nan, math.inf]]))
    run = write_run(tmp_path / "run", [[0.0]])
    for truncation in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="truncation: got"):
            summarize(run, truncation)


def test_report_of_a_collapse(tmp_path):
    heavy_run(tmp_path / "run")
    summary, pictures = write_report(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*PICTURES, "summary.json"]
    assert sorted(path.name for path in pictures) == PICTURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert [warning["step"] for warning in summary["warnings"]] == [241, 242, 243, 244]
    assert {warning["spike_step"] for warning in summary["warnings"]} == {245}
    assert summary["norm_spikes"] == list(range(245, 255))  # until the median has come up
    assert 0 < summary["tail_index"] < 2
    assert summary["heaviest_share"] > 0.5
    first, *_, last = summary["by_staleness"]
    assert first["ess_ratio"] == pytest.approx(1)
    assert last["ess_ratio"] < 0.1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "logs",
    [
        [[0.0]], [[0.0, 0.0]] * 30, [[5000.0, -5000.0, 0.0]] * 3, [[800.0] * 4] * 2, [[math.nan, 1.0], [math.nan] * 2],
        [np.linspace(-3, 3, 300).tolist()],
    ],
    ids=["one trajectory", "on-policy", "huge", "huge and alike", "not finite", "one step"],
)  # fmt: skip
def test_pictures_of_any_run(tmp_path, logs):
    run = write_run(tmp_path, logs)
    summary, pictures = write_report(tmp_path)
    assert all(path.stat().st_size > 10_000 for path in pictures)
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text)["steps"] == summary["steps"] == len(logs)
    assert "NaN," not in text.replace('"NaN"', "")
    assert len(run.steps["step"]) == len(logs)


@pytest.mark.filterwarnings("error")
def test_pictures_of_a_run_without_norms(tmp_path):
    write_run(tmp_path, [[0.0, 0.1]] * 8, norms=[None] * 8)
    assert write_report(tmp_path)[0]["norm_spikes"] == []


def test_the_truncation_is_marked_and_warnings_are_shaded(tmp_path):
    run = heavy_run(tmp_path)
    for figure, panel in ((report.draw_ess_by_staleness(run, 5.0), 1), (report.draw_heavy_tails(run, 5.0), 0)):
        texts = [text.get_text() for text in figure.axes[panel].get_legend().get_texts()]
        assert "truncation at 5" in texts
    panels = report.draw_early_warning(run).axes
    assert "from a warning to its spike" in [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert [panel.get_ylabel() for panel in panels] == [
        "ESS / trajectories", "gradient norm", "mean reward", "learning rate, scale",
    ]  # fmt: skip
    few = report.draw_ess_by_staleness(write_run(tmp_path / "few", [[0.0, 1.0]])).axes[0]
    assert "fewer than 30 trajectories" in [text.get_text() for text in few.get_legend().get_texts()]


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    write_run(tmp_path / "run", [[0.0, 1.0]])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pictures need matplotlib: pip install matplotlib"):
        write_report(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
