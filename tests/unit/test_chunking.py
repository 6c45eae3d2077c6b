from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskshare.chunking import PacketIndex, distrust, plan_chunks
from daskshare.errors import ConfigurationError

TENTH = Fraction(1, 10)


def index_of(pts, keyframes, hidden=()):
    numbers = np.arange(len(pts))
    return PacketIndex(
        pts=np.array(pts, np.int64),
        keyframe=np.isin(numbers, list(keyframes)),
        shown=~np.isin(numbers, list(hidden)),
        time_base=TENTH,
    )


def summary(plans):
    return [(p.first_packet, p.num_packets, p.first_frame, p.pts.tolist()) for p in plans]


def test_closed_groups():
    index = index_of(range(9), {0, 3, 6})
    assert summary(plan_chunks(index, chunk_seconds=0)) == [
        (0, 3, 0, [0, 1, 2]),
        (3, 3, 3, [3, 4, 5]),
        (6, 3, 6, [6, 7, 8]),
    ]


def test_pictures_shown_before_the_keyframe_belong_to_the_chunk_before():
    # I0 P2 b1 | I5 b3 b4 P6: b3 and b4 are stored after the keyframe that is shown after them.
    index = index_of([0, 2, 1, 5, 3, 4, 6], {0, 3})
    assert summary(plan_chunks(index, chunk_seconds=0)) == [
        (0, 6, 0, [0, 1, 2, 3, 4]),
        (3, 4, 5, [5, 6]),
    ]


def test_keyframe_stored_before_an_earlier_frames_successor_is_no_cut():
    # The frame shown at 7 is stored before the keyframe shown at 5: it would be decoded twice.
    index = index_of([0, 7, 5, 6, 8], {0, 2})
    assert len(plan_chunks(index, chunk_seconds=0)) == 1


def test_hidden_pictures_are_decoded_but_not_counted():
    index = index_of([0, 1, 2, 3, 4, 5], {0, 3}, hidden={1, 4})
    assert summary(plan_chunks(index, chunk_seconds=0)) == [
        (0, 3, 0, [0, 2]),
        (3, 3, 2, [3, 5]),
    ]


@pytest.mark.parametrize(
    ("chunk_seconds", "starts"),
    [
        (0, [0, 10, 20, 30, 40]),
        (1, [0, 10, 20, 30, 40]),
        (1.4, [0, 10, 20, 30, 40]),
        (1.6, [0, 20, 40]),
        (2, [0, 20, 40]),
        (100, [0]),
        (float("inf"), [0]),
    ],
)
def test_each_chunk_ends_at_the_keyframe_nearest_to_its_aim(chunk_seconds, starts):
    index = index_of(range(50), {0, 10, 20, 30, 40})
    plans = plan_chunks(index, chunk_seconds=chunk_seconds)
    assert [p.first_frame for p in plans] == starts


def test_times_not_frames_decide():
    # A variable rate: the second group lasts ten times as long as the first.
    pts = [0, 1, 2, 3, 4, 14, 24, 34, 44, 45, 46, 47]
    plans = plan_chunks(index_of(pts, {0, 4, 8}), chunk_seconds=4)
    assert [p.first_frame for p in plans] == [0, 8]


@pytest.mark.parametrize("chunk_seconds", [-1, float("nan")])
def test_wrong_chunk_seconds(chunk_seconds):
    with pytest.raises(ConfigurationError, match="chunk_seconds"):
        plan_chunks(index_of([0], {0}), chunk_seconds=chunk_seconds)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (index_of([0, 1], {1}), "begin with a keyframe"),
        (index_of([0, 2, 2], {0}), "same presentation time"),
        (index_of([2, 0, 1], {0}), "before the first keyframe"),
        (index_of([0], {0}, hidden={0}), "no frame"),
    ],
)
def test_distrust(index, reason):
    assert reason in distrust(index)


def test_trust():
    assert distrust(index_of([0, 2, 1], {0})) == ""
    # Pictures that an edit list hides may come before anything else.
    assert distrust(index_of([-2, -1, 0], {0}, hidden={0, 1})) == ""


@st.composite
def streams(draw):
    """Groups of pictures with reordering inside, and open beginnings."""
    pts, keyframes, start = [], set(), 0
    for group in range(draw(st.integers(1, 6))):
        leading = draw(st.integers(0, 3)) if group else 0
        following = draw(st.integers(0, 5))
        step = draw(st.integers(1, 40))
        keyframes.add(len(pts))
        times = [start + step * n for n in range(leading + 1 + following)]
        after = draw(st.permutations(times[leading + 1 :]))
        pts += [times[leading], *times[:leading], *after]
        start = times[-1] + step
    hidden = draw(st.sets(st.sampled_from(range(len(pts))))) - keyframes
    return index_of(pts, keyframes, hidden)


@given(streams(), st.floats(0, 20))
def test_every_frame_once_in_order_and_within_its_packets(index, chunk_seconds):
    assert distrust(index) == ""
    plans = plan_chunks(index, chunk_seconds=chunk_seconds)
    assert np.concatenate([p.pts for p in plans]).tolist() == sorted(index.pts[index.shown])
    for number, plan in enumerate(plans):
        assert index.keyframe[plan.first_packet]
        assert plan.num_frames > 0
        assert plan.first_frame == sum(p.num_frames for p in plans[:number])
        decoded = index.pts[plan.first_packet : plan.first_packet + plan.num_packets]
        assert set(plan.pts) <= set(decoded)
        # Nothing that is shown after the chunk's keyframe is stored before it.
        assert (index.pts[: plan.first_packet] < index.pts[plan.first_packet]).all()
