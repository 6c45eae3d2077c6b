from __future__ import annotations

import pytest

from daskshare._worker_rates import RecentRates


def report(busy, idle, **frames):
    """What a share says: seconds spent, and for each model its frames, in batches of 4."""
    return {
        "spent_seconds": {"busy": busy, "scheduler": idle},
        "models": {
            key: {"frames": count, "batch_size_counts": {"4": count // 4} if count else {}}
            for key, count in frames.items()
        },
    }


def test_the_first_report_says_nothing_of_what_was_before():
    assert RecentRates().recent(100.0, report(50.0, 50.0, a=400)) == {
        "seconds": 0.0,
        "time_fraction": {"busy": 0.0, "scheduler": 0.0},
        "models": {},
    }


def test_rates_are_differences_over_the_window():
    rates = RecentRates()
    rates.recent(100.0, report(50.0, 50.0, a=400, b=8))
    answer = rates.recent(102.0, report(51.5, 50.5, a=480, b=8, c=4))
    assert answer == {
        "seconds": 2.0,
        "time_fraction": {"busy": 0.75, "scheduler": 0.25},
        "models": {
            "a": {"frames_per_second": 40.0, "batch_size_counts": {"4": 20}},
            "c": {"frames_per_second": 2.0, "batch_size_counts": {"4": 1}},
        },
    }


def test_what_is_older_than_the_window_does_not_count():
    rates = RecentRates(window_seconds=5.0)
    for second in range(11):
        # Ten frames a second, and none in the last five.
        answer = rates.recent(100.0 + second, report(second, 0.0, a=10 * min(second, 6)))
    assert answer["seconds"] == 5.0
    assert answer["models"]["a"]["frames_per_second"] == pytest.approx(10 / 5)


def test_reports_in_quick_succession_keep_the_window_long_and_small():
    rates = RecentRates(window_seconds=5.0)
    for step in range(2000):
        answer = rates.recent(100.0 + step / 100, report(step / 100, 0.0, a=step))
    assert answer["seconds"] == pytest.approx(5.0, abs=0.3)
    assert len(rates._samples) <= 22


def test_reports_rarer_than_the_window_still_give_rates():
    rates = RecentRates(window_seconds=5.0)
    rates.recent(0.0, report(0.0, 0.0, a=0))
    assert rates.recent(60.0, report(60.0, 0.0, a=600))["models"]["a"]["frames_per_second"] == 10.0


@pytest.mark.parametrize("later", [report(0.5, 0.5, a=4), report(9.0, 9.0, b=4)])
def test_another_share_begins_anew(later):
    rates = RecentRates()
    rates.recent(100.0, report(5.0, 5.0, a=400))
    assert rates.recent(101.0, later)["seconds"] == 0.0
