"""Which picture is which, when a decoder names few of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskshare.video.display_order import DisplayOrder, OrderLost


def test_the_earliest_comes_first_and_the_first_of_a_piece_makes_sure():
    order = DisplayOrder(range(7))
    first, second = order.feed([0, 3, 1, 2]), order.feed([6, 4, 5])
    assert order.certain_until is None
    assert [order.shown(first) for _ in range(3)] == [0, 1, 2]
    assert order.certain_until == 0
    assert [order.shown(first) for _ in range(3)] == [3, 4, 5]
    assert (order.certain_until, order.waiting) == (0, 1)
    assert order.shown(second) == 6
    assert (order.certain_until, order.waiting) == (6, 0)


def test_packets_that_come_alone_need_no_order():
    order = DisplayOrder([3, 5, 7])
    seven, _, five = (order.feed([time]) for time in (7, 3, 5))
    # The second shows nothing.
    assert (order.shown(five), order.certain_until) == (5, 5)
    assert (order.shown(seven), order.certain_until) == (7, 7)


@given(
    st.sets(st.integers(-(2**40), 2**40), min_size=1, max_size=9),
    st.lists(st.integers(-(2**40), 2**40), max_size=9),
)
def test_numbers_ascend_with_times(expected, others):
    expected = sorted(expected)
    order = DisplayOrder(expected)
    times = sorted({*expected, *others})
    numbers = [order.feed([time]) for time in times]
    assert numbers == sorted(numbers)
    assert numbers[0] >= 0
    # Frames of the chunk share theirs with nobody.
    for time in expected:
        assert numbers.count(numbers[times.index(time)]) == 1


def test_numbers_stay_small_whatever_the_times():
    order = DisplayOrder([0, 1])
    assert order.feed([-(2**50)]) == 0
    assert order.feed([2**50]) < 4096


def test_pictures_far_outside_share_a_number():
    order = DisplayOrder([0, 1, 2])
    far = [order.feed([time]) for time in (-9000, -5000)]
    assert far == [0, 0]
    first = order.feed([0, 1])
    for number in far:
        assert order.shown(number) < 0
    assert [order.shown(first), order.shown(first)] == [0, 1]


def test_unknown_pieces():
    order = DisplayOrder([0, 1])
    number = order.feed([0])
    with pytest.raises(OrderLost, match=f"piece {number + 1} came, which was not given"):
        order.shown(number + 1)


def test_more_pictures_than_packets():
    order = DisplayOrder([0])
    number = order.feed([0])
    order.shown(number)
    with pytest.raises(OrderLost, match="more pictures"):
        order.shown(number)


@st.composite
def videos(draw):
    """Pieces of packets from a keyframe on, as times in the order of decoding."""
    count = draw(st.integers(1, 40))
    delay = draw(st.integers(0, 5))
    times = list(range(count))
    # Every picture is decoded at most ``delay`` places late.
    keys = [-1.0, *(time + draw(st.floats(0, delay)) for time in times[1:])]
    decoded = sorted(times, key=lambda time: (keys[time], time))
    pieces = []
    while decoded:
        size = draw(st.integers(1, 5))
        pieces.append(decoded[:size])
        del decoded[:size]
    return pieces


def show(pieces, lost=None):
    """Play a decoder that shows a picture once all earlier ones are there; yields times."""
    order = DisplayOrder(range(sum(map(len, pieces))))
    own, given, last, next_time = {}, set(), None, 0
    for piece in pieces:
        own[piece[0]] = order.feed(piece)
        given.update(piece)
        while next_time in given:
            time, next_time = next_time, next_time + 1
            if time == lost:
                continue
            last = own.get(time, last)
            # Without its first picture, what follows counts as the rest of a chunk before.
            if last is not None:
                yield time, order.shown(last), order


@given(videos())
def test_every_picture_gets_its_time(pieces):
    shown = [(true, time) for true, time, _ in show(pieces)]
    assert shown == [(time, time) for time in range(sum(map(len, pieces)))]


@given(videos(), st.data())
def test_no_wrong_time_is_certain(pieces, data):
    count = sum(map(len, pieces))
    lost = data.draw(st.integers(0, count - 1))
    wrong, order = [], DisplayOrder([0])
    try:
        for true, time, order in show(pieces, lost):
            if time != true:
                wrong.append(time)
            if order.certain_until is not None:
                assert [t for t in wrong if t <= order.certain_until] == []
    except OrderLost:
        return
    # What was not noticed is not certain in the end, or was one packet alone, whose place is known.
    assert order.waiting or [lost] in pieces or not wrong
