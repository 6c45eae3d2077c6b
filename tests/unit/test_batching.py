from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daskshare.batching import Batch, DynamicBatcher, Part
from daskshare.errors import ConfigurationError, InvalidInputError


def batcher(**options) -> DynamicBatcher:
    defaults = {"max_batch_size": 8, "max_wait_seconds": 1.0, "max_queue_items": 64}
    return DynamicBatcher(**(defaults | options))


def test_nothing_waits():
    b = batcher()
    assert b.next_batch(0.0, device_idle=True) is None
    assert b.deadline() is None
    assert b.num_items == 0


def test_full_batch_is_due_on_a_busy_device():
    b = batcher()
    assert b.admit("a", 5, 0.0)
    assert b.next_batch(0.0, device_idle=False) is None
    assert b.admit("b", 5, 0.5, task=1)
    assert b.deadline() == 0.0
    assert b.next_batch(0.5, device_idle=False) == Batch(
        (Part("a", 0, 5), Part("b", 0, 3)), 8, 8, None
    )
    assert b.num_items == 2
    assert b.deadline() == 1.5


def test_partial_batch_is_due_after_the_wait():
    b = batcher()
    b.admit("a", 3, 10.0)
    b.admit("b", 1, 10.9)
    assert b.deadline() == 11.0
    assert b.next_batch(10.999, device_idle=False) is None
    due = b.next_batch(11.0, device_idle=False)
    assert due is not None
    assert due.num_items == 4


def test_a_busy_device_lets_a_batch_fill_until_it_could_start():
    b = batcher()
    b.admit("a", 3, 0.0)
    assert b.next_batch(2.0, device_idle=False, not_before_seconds=2.5) is None
    b.admit("b", 5, 2.0)
    due = b.next_batch(2.1, device_idle=False, not_before_seconds=2.5)
    assert due is not None
    assert due.num_items == 8
    b.admit("c", 3, 2.1)
    assert b.next_batch(3.1, device_idle=False, not_before_seconds=3.2) is None
    assert b.next_batch(3.2, device_idle=False, not_before_seconds=3.2) is not None
    b.admit("d", 3, 3.2)
    assert b.next_batch(3.2, device_idle=True, not_before_seconds=9.0) is not None


def test_idle_device_takes_what_waits():
    b = batcher()
    b.admit("a", 3, 0.0)
    due = b.next_batch(0.0, device_idle=True)
    assert due is not None
    assert due.parts == (Part("a", 0, 3),)


def test_batches_are_padded_to_preferred_sizes():
    b = batcher(batch_sizes=(1, 4, 16), max_batch_size=8)
    assert [b.padded_size(n) for n in range(1, 9)] == [1, 4, 4, 4, 8, 8, 8, 8]
    b.set_ceiling(6)
    assert [b.padded_size(n) for n in range(1, 7)] == [1, 4, 4, 4, 6, 6]
    assert [batcher().padded_size(n) for n in (1, 3, 8)] == [1, 3, 8]


def test_the_sizes_may_change_later():
    b = batcher(batch_sizes=(1, 4, 16), max_batch_size=8)
    b.set_batch_sizes([2])
    assert [b.padded_size(n) for n in range(1, 9)] == [2, 2, 8, 8, 8, 8, 8, 8]
    b.set_ceiling(6)
    assert [b.padded_size(n) for n in (1, 3)] == [2, 6]
    b.set_batch_sizes([])
    assert [b.padded_size(n) for n in (1, 3)] == [6, 6]
    for wrong in ([0], [9]):
        with pytest.raises(ConfigurationError, match="expected 1 to 8"):
            b.set_batch_sizes(wrong)


def test_full_queue_refuses_and_changes_nothing():
    b = batcher(max_queue_items=8)
    assert b.admit("a", 6, 0.0)
    assert not b.admit("b", 3, 0.0)
    assert b.num_items == 6
    assert b.admit("b", 2, 0.0)


@pytest.mark.parametrize("num_items", [0, 65])
def test_impossible_sizes_are_refused(num_items):
    with pytest.raises(InvalidInputError, match="1 to 64"):
        batcher().admit("a", num_items, 0.0)


def test_a_waiting_id_is_refused():
    b = batcher()
    b.admit("a", 1, 0.0)
    with pytest.raises(InvalidInputError, match="'a'"):
        b.admit("a", 1, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0},
        {"max_queue_items": 0},
        {"max_wait_seconds": -1.0},
        {"max_wait_seconds": float("nan")},
        {"batch_sizes": (0, 4)},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ConfigurationError):
        batcher(**options)


@pytest.mark.parametrize("ceiling", [0, 9])
def test_wrong_ceiling(ceiling):
    with pytest.raises(ConfigurationError, match="1 to 8"):
        batcher().set_ceiling(ceiling)


def test_a_flood_delays_another_tasks_small_request_by_one_batch():
    b = batcher()
    b.admit("flood", 60, 0.0, task="flood")
    first = b.next_batch(0.0, device_idle=True)
    assert first is not None
    assert first.parts == (Part("flood", 0, 8),)
    b.admit("small", 2, 0.0, task="small")
    assert b.next_batch(0.0, device_idle=True).parts == (Part("flood", 8, 16),)
    assert b.next_batch(0.0, device_idle=True).parts == (
        Part("small", 0, 2),
        Part("flood", 16, 22),
    )


def test_many_requests_of_one_task_do_not_delay_another():
    b = batcher()
    for i in range(30):
        b.admit(i, 2, 0.0, task="flood")
    b.admit("small", 1, 0.0, task="small")
    first = b.next_batch(0.0, device_idle=True)
    assert first is not None
    assert first.parts[:3] == (Part(0, 0, 2), Part("small", 0, 1), Part(1, 0, 2))


def test_a_request_alone_comes_in_whole_batches():
    b = batcher()
    b.admit("a", 3, 0.0, task=0)
    b.admit("b", 20, 0.0, task=1)
    batches = [b.next_batch(0.0, device_idle=True) for _ in range(3)]
    assert [x.parts for x in batches if x] == [
        (Part("a", 0, 3), Part("b", 0, 5)),
        (Part("b", 5, 13),),
        (Part("b", 13, 20),),
    ]


def test_groups_do_not_mix_and_take_turns():
    b = batcher()
    for i in range(6):
        b.admit(("big", i), 8, 0.0, group="big")
    b.admit("small", 1, 0.0, group=None)
    order = [b.next_batch(5.0, device_idle=False) for _ in range(2)]
    assert [x.group for x in order if x] == ["big", None]


def test_full_group_goes_before_one_that_may_still_fill():
    b = batcher()
    b.admit("partial", 1, 0.0, group="p")
    b.admit("full", 8, 0.1, group="f")
    due = b.next_batch(0.2, device_idle=True)
    assert due is not None
    assert due.group == "f"


def test_cancel_forgets_what_still_waits():
    b = batcher()
    b.admit("a", 12, 0.0)
    b.admit("b", 2, 0.0)
    b.next_batch(0.0, device_idle=False)
    assert b.cancel("a") == 4
    assert b.cancel("a") == 0
    due = b.next_batch(0.0, device_idle=True)
    assert due is not None
    assert due.parts == (Part("b", 0, 2),)
    assert b.num_items == 0
    assert b.cancel("b") == 0


def test_ceiling_bounds_later_batches():
    b = batcher()
    b.admit("a", 20, 0.0)
    b.next_batch(0.0, device_idle=False)
    b.set_ceiling(3)
    due = b.next_batch(0.0, device_idle=False)
    assert due is not None
    assert due.parts == (Part("a", 8, 11),)


class BatcherMachine(RuleBasedStateMachine):
    """Random admissions, batches, cancellations and ceilings against a plain account of items."""

    def __init__(self):
        super().__init__()
        self.batcher = DynamicBatcher(
            max_batch_size=10, max_wait_seconds=1.0, max_queue_items=40, batch_sizes=(1, 4, 10)
        )
        self.now = 0.0
        self.next_id = 0
        self.waiting: dict[int, list[int]] = {}
        self.about: dict[int, tuple[int, int]] = {}
        self.batches_since: dict[int, int] = {}

    @rule(num=st.integers(1, 40), task=st.integers(0, 4), group=st.integers(0, 2))
    def admit(self, num, task, group):
        total = sum(len(items) for items in self.waiting.values())
        admitted = self.batcher.admit(self.next_id, num, self.now, task=task, group=group)
        assert admitted == (total + num <= 40)
        if admitted:
            self.waiting[self.next_id] = list(range(num))
            self.about[self.next_id] = (task, group)
            self.batches_since[self.next_id] = 0
        self.next_id += 1

    @rule(idle=st.booleans())
    def take(self, idle):
        overdue = self.batcher.deadline()
        batch = self.batcher.next_batch(self.now, device_idle=idle)
        assert (batch is not None) == (
            bool(self.waiting) and (idle or (overdue is not None and overdue <= self.now))
        )
        if batch is None:
            return
        count = 0
        for request_id, start, stop in batch.parts:
            task, group = self.about[request_id]
            assert group == batch.group
            # In order, none lost, none twice: always the front of what the request still has.
            assert self.waiting[request_id][: stop - start] == list(range(start, stop))
            del self.waiting[request_id][: stop - start]
            earlier = [i for i in self.waiting if i < request_id and self.about[i] == (task, group)]
            assert not [i for i in earlier if self.waiting[i]]
            count += stop - start
            if not self.waiting[request_id]:
                del self.waiting[request_id], self.batches_since[request_id]
        assert count == batch.num_items <= batch.padded_size <= self.batcher.ceiling
        for request_id in self.batches_since:
            self.batches_since[request_id] += 1

    @rule(seconds=st.floats(0.0, 2.0))
    def pass_time(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.batcher.cancel(request_id) == len(self.waiting.pop(request_id))
        del self.batches_since[request_id]

    @rule(ceiling=st.integers(3, 10))
    def set_ceiling(self, ceiling):
        self.batcher.set_ceiling(ceiling)

    @invariant()
    def counts_agree(self):
        assert self.batcher.num_items == sum(len(items) for items in self.waiting.values())
        assert (self.batcher.deadline() is None) == (not self.waiting)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@given(
    flood_tasks=st.integers(1, 5),
    num_items=st.integers(1, 8),
    groups=st.integers(1, 3),
    refill=st.integers(1, 30),
)
@settings(deadline=None)
def test_bounded_wait_under_a_flood_that_never_ends(flood_tasks, num_items, groups, refill):
    b = batcher(max_queue_items=200)
    next_id = 0

    def flood() -> None:
        nonlocal next_id
        while b.admit(next_id, refill, 0.0, task=next_id % flood_tasks, group=next_id % groups):
            next_id += 1

    b.cancel(next_id)
    b.admit("victim", num_items, 0.0, task="victim", group=0)
    flood()
    waited = 0
    done = 0
    while done < num_items:
        batch = b.next_batch(2.0, device_idle=False)
        assert batch is not None
        done += sum(p.stop - p.start for p in batch.parts if p.request_id == "victim")
        waited += 1
        flood()
    # A turn of each other task, one for its own, in each of the groups' turns.
    assert waited <= (flood_tasks + 2) * groups


@given(st.floats(0, 1e9), st.floats(1e-6, 10.0))
def test_at_its_deadline_a_batch_is_due(now, wait):
    b = batcher(max_wait_seconds=wait)
    b.admit("a", 1, now)
    deadline = b.deadline()
    assert deadline is not None
    assert b.next_batch(deadline, device_idle=False) is not None


def test_idle_device_waits_for_a_task_that_was_just_served():
    b = batcher()
    b.admit("a1", 3, 0.0, task="a")
    b.admit("b1", 3, 0.0, task="b")
    first = b.next_batch(0.0, device_idle=True)
    assert first is not None
    assert first.num_items == 6
    b.finished("a", 5.0)
    b.finished("b", 5.0)
    b.admit("a2", 3, 5.2, task="a")
    assert b.next_batch(5.2, device_idle=True) is None
    assert b.deadline() == 6.0
    b.admit("b2", 3, 5.4, task="b")
    both = b.next_batch(5.4, device_idle=True)
    assert both is not None
    assert both.num_items == 6


def test_idle_device_stops_waiting_for_a_task_that_does_not_come():
    b = batcher()
    b.admit("b1", 1, 0.0, task="b")
    b.next_batch(0.0, device_idle=True)
    b.finished("b", 5.0)
    b.admit("a", 3, 5.2, task="a")
    assert b.next_batch(5.999, device_idle=True) is None
    alone = b.next_batch(6.0, device_idle=True)
    assert alone is not None
    assert alone.parts == (Part("a", 0, 3),)


def test_task_with_another_request_is_not_expected():
    b = batcher()
    b.admit("a1", 1, 0.0, task="a")
    b.admit("a2", 1, 0.0, task="a")
    b.next_batch(0.0, device_idle=True)
    b.finished("a", 1.0)
    b.admit("c", 1, 1.0, task="c")
    assert b.next_batch(1.0, device_idle=True) is not None


def test_oldest_seconds_over_all_groups():
    batcher = DynamicBatcher(max_batch_size=4, max_wait_seconds=1.0, max_queue_items=16)
    assert batcher.oldest_seconds() is None
    batcher.admit("a", 2, 5.0, group="one")
    batcher.admit("b", 1, 3.0, group="other")
    assert batcher.oldest_seconds() == 3.0
    batcher.cancel("b")
    assert batcher.oldest_seconds() == 5.0
