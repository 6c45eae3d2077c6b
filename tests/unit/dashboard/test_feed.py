from __future__ import annotations

from types import SimpleNamespace

import pytest

import daskshare.dashboard.feed
from daskshare.dashboard.feed import HISTORY_SECONDS, Feed
from tests.unit.dashboard.reports import model, report


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(daskshare.dashboard.feed, "time", lambda: now.seconds)
    return now


def scheduler(num_workers=1):
    return SimpleNamespace(
        workers={
            f"tcp://{i}": SimpleNamespace(
                name=i,
                metrics={"daskshare": report(f"s{i}", model(), rates={"key-of-m": 2.0})},
            )
            for i in range(num_workers)
        }
    )


def test_many_who_look_cost_one_look(clock):
    feed = Feed(scheduler())
    first = feed.snapshot()
    clock.seconds += 0.4
    assert feed.snapshot() is first
    clock.seconds += 0.2
    second = feed.snapshot()
    assert second is not first
    assert second.time == clock.seconds


def test_larger_clusters_are_looked_at_less_often():
    intervals = [Feed(scheduler(n)).interval_seconds for n in (1, 100, 1000)]
    assert intervals == sorted(intervals)
    assert len(set(intervals)) == 3


def test_history_is_of_the_last_minutes(clock):
    feed = Feed(scheduler(2))
    for _ in range(400):
        feed.snapshot()
        clock.seconds += 1.0
    times = [at for at, _ in feed.history]
    assert times[-1] - times[0] == HISTORY_SECONDS
    assert feed.history[-1][1] == {"key-of-m": 4.0}


def test_held_tasks_are_asked_for(clock):
    feed = Feed(scheduler(), lambda: {"key-of-m": 5})
    assert feed.snapshot().models[0]["held_tasks"] == 5


def test_a_worker_without_a_report(clock):
    plain = scheduler()
    plain.workers["tcp://0"].metrics = {}
    assert Feed(plain).snapshot().gpus[0]["state"] == "starting"
