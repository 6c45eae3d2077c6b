from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskshare.timesplit import STATES, TimeSplit


def test_a_device_without_tasks_waits_for_the_scheduler():
    split = TimeSplit(10.0)
    assert split.state == "scheduler"
    assert split.spent_seconds(13.0) == dict.fromkeys(STATES, 0.0) | {"scheduler": 3.0}


def test_each_moment_goes_to_the_first_state_that_applies():
    split = TimeSplit(0.0)
    split.change("input", 1, 1.0)  # a task comes
    split.change("loading", 1, 2.0)  # and loads the model
    split.change("loading", -1, 5.0)
    split.change("decoding", 1, 5.5)
    split.change("busy", 1, 7.0)  # decoding goes on beside it
    split.change("busy", -1, 8.0)
    split.change("decoding", -1, 9.0)
    split.change("input", -1, 9.25)
    assert split.spent_seconds(10.0) == {
        "scheduler": 1.0 + 0.75,
        "input": 1.0 + 0.5 + 0.25,
        "loading": 3.0,
        "decoding": 1.5 + 1.0,
        "busy": 1.0,
    }


def test_an_activity_lasts_until_its_last_party_ends():
    split = TimeSplit(0.0)
    split.change("busy", 1, 0.0)
    split.change("busy", 1, 1.0)
    split.change("busy", -1, 2.0)
    assert split.state == "busy"
    split.change("busy", -1, 3.0)
    assert split.state == "scheduler"


def test_more_ends_than_begins_are_refused_and_change_nothing():
    split = TimeSplit(0.0)
    with pytest.raises(ValueError, match="busy ends more often than it began"):
        split.change("busy", -1, 1.0)
    split.change("busy", 1, 1.0)
    assert split.state == "busy"


def test_a_clock_read_out_of_order_takes_nothing_back():
    split = TimeSplit(0.0)
    split.change("busy", 1, 2.0)
    split.change("busy", -1, 1.5)
    assert split.spent_seconds(3.0) == dict.fromkeys(STATES, 0.0) | {"scheduler": 3.0}


@given(st.lists(st.tuples(st.sampled_from(STATES[:-1]), st.floats(0, 5)), max_size=30))
def test_the_states_add_up_to_the_age(steps):
    split, now = TimeSplit(100.0), 100.0
    open_ones = dict.fromkeys(STATES, 0)
    for activity, seconds in steps:
        now += seconds
        by = -1 if open_ones[activity] else 1
        open_ones[activity] += by
        split.change(activity, by, now)
    assert sum(split.spent_seconds(now).values()) == pytest.approx(now - 100.0)
