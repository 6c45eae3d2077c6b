"""What a held task remembers; the scheduler is played, tests/cluster has real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from dask._task_spec import Task
from distributed import Status

from daskshare._allocator_holding import HELD_AT, HeldTask, dependency_bytes
from daskshare.testing import FakeSpec
from daskshare.video.chunk import VideoChunk


def task_state(**changes):
    return SimpleNamespace(
        **{
            "key": "k",
            "run_spec": Task("k", len, ()),
            "suspicious": 0,
            "worker_restrictions": None,
            "host_restrictions": None,
            "loose_restrictions": False,
            "dependencies": (),
        }
        | changes
    )


class Scheduler:
    def __init__(self, **status_of_workers):
        self.workers = {
            f"tcp://{name}:1": SimpleNamespace(status=Status[status])
            for name, status in status_of_workers.items()
        }
        self.host_info = {name: {"addresses": {f"tcp://{name}:1"}} for name in status_of_workers}

    def coerce_hostname(self, host):
        return host


def test_the_users_restrictions_come_back():
    mine = {
        "worker_restrictions": {"tcp://a:1"},
        "host_restrictions": {"b"},
        "loose_restrictions": True,
    }
    ts = task_state(**mine)
    held = HeldTask(ts, "model")
    held.hold(ts)
    assert ts.worker_restrictions == {HELD_AT}
    assert (ts.host_restrictions, ts.loose_restrictions) == (None, False)
    held.send(ts, "tcp://c:1", {"tcp://c:1"})
    assert ts.worker_restrictions == {"tcp://c:1"}
    assert held.worker == "tcp://c:1"
    held.hold(ts)
    held.restore(ts)
    assert {name: getattr(ts, name) for name in mine} == mine
    assert held.worker is None


def test_free_tasks_may_run_anywhere():
    held = HeldTask(task_state(), "model")
    assert not held.restricted
    assert not held.may_change
    assert held.allowed(Scheduler(a="running")) is None


def test_hosts_are_resolved_anew_each_time():
    held = HeldTask(task_state(worker_restrictions={"tcp://x:1"}, host_restrictions={"b"}), "model")
    assert held.may_change
    assert held.allowed(Scheduler(a="running")) == {"tcp://x:1"}
    assert held.allowed(Scheduler(a="running", b="running")) == {"tcp://x:1", "tcp://b:1"}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [({"a": "running"}, None), ({"x": "paused"}, None), ({"x": "running"}, {"tcp://x:1"})],
)
def test_preferred_workers_count_only_while_one_is_running(workers, expected):
    held = HeldTask(task_state(worker_restrictions={"tcp://x:1"}, loose_restrictions=True), "m")
    assert held.may_change
    assert held.allowed(Scheduler(**workers)) == expected


def die(held, ts, *, in_company):
    """What Dask does, then what the allocator makes of it."""
    held.send(ts, "tcp://a:1", {"tcp://a:1"})
    ts.suspicious += 1
    held.worker_died(ts, in_company=in_company)


def test_deaths_in_company_do_not_count_and_two_of_them_isolate():
    ts = task_state()
    held = HeldTask(ts, "model")
    die(held, ts, in_company=True)
    assert (ts.suspicious, held.alone) == (0, False)
    die(held, ts, in_company=True)
    assert (ts.suspicious, held.alone) == (0, True)
    die(held, ts, in_company=False)
    die(held, ts, in_company=False)
    assert (ts.suspicious, held.alone) == (2, True)
    held.cleared()
    assert not held.alone


def test_a_worker_that_was_told_to_leave_is_no_death():
    ts = task_state()
    held = HeldTask(ts, "model")
    held.send(ts, "tcp://a:1", {"tcp://a:1"})
    held.worker_died(ts, in_company=False)
    assert (ts.suspicious, held.alone, held.deaths) == (0, False, 0)


def test_bytes_of_dependencies_are_added_up_by_worker():
    def dependency(nbytes, *addresses):
        holders = [SimpleNamespace(address=address) for address in addresses]
        return SimpleNamespace(get_nbytes=lambda: nbytes, who_has=holders or None)

    ts = task_state(dependencies=[dependency(5, "a", "b"), dependency(7, "b"), dependency(9)])
    assert dependency_bytes(ts) == {"a": 5, "b": 12}
    assert dependency_bytes(task_state()) is None


def test_frames_are_those_of_the_chunks_it_was_given():
    chunk = VideoChunk(video="a.mp4", index=0, num_frames=250)
    ts = task_state(run_spec=Task("k", len, chunk, FakeSpec(), 3))
    assert HeldTask(ts, "model").frames == 250
    assert HeldTask(task_state(), "model").frames is None
