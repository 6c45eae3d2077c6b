from __future__ import annotations

import pytest

from daskshare._worker_report import RecentRates, batch_bins, for_heartbeat


def report(busy, idle, **frames):
    """What a share says: seconds spent, and for each model its frames, in batches of 4."""
    batches = sum(frames.values()) // 4
    return {
        "spent_seconds": {"busy": busy, "scheduler": idle},
        "models": {k: {"frames": n, "batches": n // 4} for k, n in frames.items()},
        "batch_bins": {"4": batches} if batches else {},
    }


def test_the_first_report_says_nothing_of_what_was_before():
    assert RecentRates().recent(100.0, report(50.0, 50.0, a=400)) == {
        "seconds": 0.0,
        "time_fraction": {"busy": 0.0, "scheduler": 0.0},
        "frames": 0,
        "batches": 0,
        "batch_bins": {},
        "frames_per_second": {},
    }


def test_rates_are_differences_over_the_window():
    rates = RecentRates()
    rates.recent(100.0, report(50.0, 50.0, a=400, b=8))
    answer = rates.recent(102.0, report(51.5, 50.5, a=480, b=8, c=4))
    assert answer == {
        "seconds": 2.0,
        "time_fraction": {"busy": 0.75, "scheduler": 0.25},
        "frames": 84,
        "batches": 21,
        "batch_bins": {"4": 21},
        "frames_per_second": {"a": 40.0, "c": 2.0},
    }


def test_what_is_older_than_the_window_does_not_count():
    rates = RecentRates(window_seconds=5.0)
    for second in range(11):
        # Ten frames a second, and none in the last five.
        answer = rates.recent(100.0 + second, report(second, 0.0, a=10 * min(second, 6)))
    assert answer["seconds"] == 5.0
    assert answer["frames_per_second"]["a"] == pytest.approx(10 / 5)


def test_reports_in_quick_succession_keep_the_window_long_and_small():
    rates = RecentRates(window_seconds=5.0)
    for step in range(2000):
        answer = rates.recent(100.0 + step / 100, report(step / 100, 0.0, a=step))
    assert answer["seconds"] == pytest.approx(5.0, abs=0.3)
    assert len(rates._samples) <= 22


def test_reports_rarer_than_the_window_still_give_rates():
    rates = RecentRates(window_seconds=5.0)
    rates.recent(0.0, report(0.0, 0.0, a=0))
    assert rates.recent(60.0, report(60.0, 0.0, a=600))["frames_per_second"] == {"a": 10.0}


@pytest.mark.parametrize("later", [report(0.5, 0.5, a=4), report(9.0, 9.0, b=4)])
def test_another_share_begins_anew(later):
    rates = RecentRates()
    rates.recent(100.0, report(5.0, 5.0, a=400))
    assert rates.recent(101.0, later)["seconds"] == 0.0


def test_batches_are_binned_by_powers_of_two():
    counts = [{"1": 5, "3": 1, "4": 2, "64": 7}, {"2": 1, "5": 3, "65": 1}]
    assert batch_bins(counts) == {"1": 5, "2": 1, "4": 3, "8": 3, "64": 7, "128": 1}
    assert batch_bins([]) == {}


def test_heartbeats_leave_the_histograms_of_each_model_out():
    engine = {"queue_frames": 3, "batch_size_counts": {"4": 1}}
    full = {
        "state": "ready",
        "models": {
            "a": {"name": "a", "batch_size_counts": {"4": 1}, "engine": engine},
            "b": {"name": "b", "batch_size_counts": {}, "engine": None},
        },
    }
    assert for_heartbeat(full) == {
        "state": "ready",
        "models": {
            "a": {"name": "a", "engine": {"queue_frames": 3}},
            "b": {"name": "b", "engine": None},
        },
    }
    assert engine["batch_size_counts"] == {"4": 1}, "the report itself stays whole"
    assert for_heartbeat({}) == {}
