"""Following and counting of example 05, on made-up traffic whose counts are known."""

from __future__ import annotations

import importlib.util

import numpy as np
import pandas as pd
import pytest

from tests.examples.conftest import ROOT

SIZE = 40


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(
        "count_vehicles", ROOT / "examples" / "05_count_vehicles.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drive(start, step, frames, *, first=0, unseen=()):
    """Detections of one vehicle that moves by ``step`` (x, y) pixels a frame."""
    rows = []
    for i in range(frames):
        if first + i in unseen:
            continue
        x, y = np.add(start, np.multiply(step, i))
        rows.append({"frame": first + i, "x_min": x, "y_min": y, "x_max": x + SIZE})
        rows[-1]["y_max"] = y + SIZE
    return pd.DataFrame(rows)


LINE = ((0, 240), (640, 240))


def test_each_vehicle_keeps_its_number(example):
    cars = [
        drive((20, 20), (5, 4), 60),
        drive((500, 400), (-4, -5), 60),
        drive((300, 100), (0, 0), 60),
    ]
    tracked = example.follow(pd.concat(cars), reach_pixels=30)
    assert tracked["track"].nunique() == 3
    assert tracked.groupby("track")["frame"].count().tolist() == [60] * 3


def test_two_cross_and_the_directions_are_told_apart(example):
    cars = pd.concat(
        [
            drive((20, 20), (5, 5), 60),  # down across
            drive((60, 300), (5, -4), 60, first=30),  # up across
            drive((400, 20), (2, 1), 60),  # stays above
            drive((580, 150), (0, 4), 40),  # down across
        ]
    )
    tracked = example.follow(cars, reach_pixels=30)
    assert example.crossings(tracked, LINE) == (1, 2)
    assert example.crossings(tracked, LINE[::-1]) == (2, 1)


def test_chunk_borders_and_their_order_make_no_difference(example):
    """The table's parts come in any order; a vehicle at a border is neither lost nor twice."""
    cars = pd.concat([drive((20, 20), (5, 4), 90), drive((560, 420), (-5, -4), 90)])
    whole = example.follow(cars, reach_pixels=30)
    for chunk_frames in (1, 7, 30):
        parts = [part for _, part in cars.groupby(cars["frame"] // chunk_frames)]
        mixed = pd.concat(parts[::-1])
        pd.testing.assert_frame_equal(example.follow(mixed, reach_pixels=30), whole)
    assert example.crossings(whole, LINE) == (1, 1)


def test_a_vehicle_that_is_unseen_for_a_while_is_the_same(example):
    car = drive((20, 100), (1, 3), 80, unseen=range(40, 46))
    tracked = example.follow(car, reach_pixels=30, memory_frames=12)
    assert tracked["track"].nunique() == 1
    assert example.crossings(tracked, LINE) == (0, 1)
    # Longer than the memory: another one.
    gone = drive((20, 100), (1, 3), 80, unseen=range(40, 60))
    assert example.follow(gone, reach_pixels=30, memory_frames=12)["track"].nunique() == 2


def test_one_that_comes_back_does_not_count(example):
    there = drive((100, 150), (0, 4), 30)
    back = drive((100, 266), (0, -4), 30, first=30)
    tracked = example.follow(pd.concat([there, back]), reach_pixels=30)
    assert tracked["track"].nunique() == 1
    assert example.crossings(tracked, LINE) == (0, 0)


def test_beside_the_end_of_the_line_is_not_across_it(example):
    tracked = example.follow(drive((500, 150), (0, 4), 40), reach_pixels=30)
    assert example.crossings(tracked, ((0, 240), (400, 240))) == (0, 0)
    assert example.crossings(tracked, ((0, 240), (640, 240))) == (0, 1)


def test_specks_do_not_count(example):
    tracked = example.follow(drive((100, 190), (0, 5), 4), reach_pixels=30)
    assert example.crossings(tracked, LINE) == (0, 0)
    assert example.crossings(tracked, LINE, min_detections=2) == (0, 1)


def test_nothing_seen(example):
    empty = drive((0, 0), (0, 0), 1).iloc[:0]
    assert example.crossings(example.follow(empty, reach_pixels=30), LINE) == (0, 0)
