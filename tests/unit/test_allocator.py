"""Notes that hooks take, and when the pool hears of them; tests/cluster has real schedulers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from dask._task_spec import Task
from distributed import Status

from daskshare._allocator_holding import HELD_AT
from daskshare.allocator import Allocator
from daskshare.client import SharedModel
from daskshare.config import AllocatorOptions
from daskshare.testing import FakeSpec
from daskshare.worker_plugin import PLUGIN_NAME

ADDRESS = "tcp://a:1"


HANDLE = SharedModel(FakeSpec(name="m", model_bytes=10))


class Video:
    num_frames = None

    def __init__(self, num_frames):
        self.num_frames = num_frames


class Scheduler:
    """Puts tasks into the states that it is told, and tells the allocator."""

    def __init__(self):
        self.workers, self.tasks, self.plugins, self.unrunnable = {}, {}, {}, {}
        self.no_workers_timeout = None
        self.sent = []
        self.events = []

    def log_event(self, topic, message):
        self.events.append(message)

    def transitions(self, recommendations, stimulus_id):
        for key, state in reversed(recommendations.items()):
            [address] = self.tasks[key].worker_restrictions
            assert address in self.workers
            self.sent.append(key)
            self.move(key, state)

    def move(self, key, *states):
        for state in states:
            ts = self.tasks[key]
            start, ts.state = ts.state, state
            self.allocator.transition(key, start, state)
            if state == "forgotten":
                del self.tasks[key]

    def task(self, key, *arguments, priority=0, workers=None):
        """A task that could run now."""
        self.tasks[key] = SimpleNamespace(
            key=key,
            run_spec=Task(key, len, HANDLE, *arguments),
            annotations=None,
            actor=False,
            state="waiting",
            suspicious=0,
            worker_restrictions=workers,
            host_restrictions=None,
            loose_restrictions=False,
            resource_restrictions=None,
            dependencies=(),
            priority=(priority,),
            processing_on=None,
        )
        self.allocator.update_graph([key])
        assert self.tasks[key].worker_restrictions == {HELD_AT}
        self.move(key, "no-worker")

    def join(self, address):
        report = {
            "state": "ready",
            "reason": "",
            "share": address,
            "device": {"uuid": address, "kind": "cuda"},
            "budget_bytes": 100,
            "free_bytes": 100,
            "models": {HANDLE.key: {"state": "ready", "model_bytes": 10}},
        }
        self.workers[address] = SimpleNamespace(
            address=address,
            status=Status.running,
            nthreads=1,
            resources={},
            metrics={PLUGIN_NAME: report},
            long_running=set(),
        )
        self.allocator.add_worker(self.workers[address])

    def leave(self, address):
        del self.workers[address]
        self.allocator.remove_worker(address)


def in_a_loop(test):
    """Run a test with a scheduler and an allocator in an event loop."""

    def run():
        async def main():
            scheduler = Scheduler()
            scheduler.allocator = allocator = Allocator(scheduler, AllocatorOptions.from_config())
            allocator.register(HANDLE)
            try:
                await test(scheduler, allocator)
                allocator.settle()
                allocator.pool.validate()
            finally:
                allocator.close()

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


async def next_step():
    # What hooks asked for in this step runs in the next one.
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@in_a_loop
async def test_what_hooks_noted_is_told_before_the_next_decision(scheduler, allocator):
    scheduler.join(ADDRESS)
    scheduler.task("x")
    scheduler.task("y")
    assert scheduler.sent == []
    await next_step()
    assert scheduler.sent == ["x", "y"]
    scheduler.move("x", "memory")
    scheduler.task("z")
    assert "x" in allocator.pool
    await next_step()
    assert scheduler.sent == ["x", "y", "z"]
    assert "x" not in allocator.pool


@in_a_loop
async def test_tasks_that_came_together_are_sent_in_their_order(scheduler, allocator):
    scheduler.join(ADDRESS)
    keys = [f"x{number}" for number in range(8)]
    for number, key in enumerate(keys):
        # The pool hears of restricted ones one by one, of others together.
        scheduler.task(key, workers={ADDRESS} if number in (2, 3, 6) else None)
    for key in keys:
        await next_step()
        scheduler.move(key, "memory")
    assert scheduler.sent == keys


@in_a_loop
async def test_a_result_that_is_lost_in_the_step_in_which_it_came_is_made_again(
    scheduler, allocator
):
    scheduler.join(ADDRESS)
    scheduler.task("x")
    await next_step()
    scheduler.move("x", "memory", "released", "waiting", "no-worker")
    await next_step()
    assert scheduler.sent == ["x", "x"]


@in_a_loop
async def test_a_task_cancelled_before_the_pool_heard_of_it_is_never_sent(scheduler, allocator):
    scheduler.join(ADDRESS)
    scheduler.task("x")
    scheduler.task("y")
    scheduler.move("x", "released", "forgotten")
    await next_step()
    assert scheduler.sent == ["y"]


@in_a_loop
async def test_a_restart_leaves_nothing_of_results_of_its_step(scheduler, allocator):
    scheduler.join(ADDRESS)
    scheduler.task("x")
    await next_step()
    scheduler.move("x", "memory", "released", "forgotten")
    allocator.restart()
    scheduler.leave(ADDRESS)
    assert len(allocator.pool) == 0
    scheduler.join(ADDRESS)
    scheduler.task("y")
    await next_step()
    assert scheduler.sent == ["x", "y"]


@in_a_loop
async def test_a_worker_that_dies_gives_its_tasks_back(scheduler, allocator):
    scheduler.join(ADDRESS)
    for key in ("x", "y"):
        scheduler.task(key)
    await next_step()
    scheduler.move("y", "memory")
    del scheduler.workers[ADDRESS]
    scheduler.move("x", "released", "waiting", "no-worker")
    allocator.remove_worker(ADDRESS)
    assert ("x" in allocator.pool, "y" in allocator.pool) == (True, False)
    scheduler.join("tcp://b:1")
    await next_step()
    assert scheduler.sent == ["x", "y", "x"]


@pytest.mark.parametrize("num_frames", [-1, 0, float("inf"), float("nan"), "many", None])
def test_frames_that_are_no_number_are_not_known(num_frames):
    @in_a_loop
    async def run(scheduler, allocator):
        scheduler.join(ADDRESS)
        scheduler.task("x", Video(num_frames))
        scheduler.task("y")
        await next_step()
        assert scheduler.sent == ["x", "y"]

    run()


@in_a_loop
async def test_a_wake_that_comes_soon_enough_stays(scheduler, allocator):
    loop = asyncio.get_running_loop()
    set_ = []
    call_later = loop.call_later

    def note(delay, callback, *args):
        if callback == allocator._awake:
            set_.append(call_later(3600, callback, *args))
            return set_[-1]
        return call_later(delay, callback, *args)

    loop.call_later = note
    allocator._wake_at(1e9)
    allocator._wake_at(2e9)
    assert [timer.cancelled() for timer in set_] == [False]
    allocator._wake_at(5e8)
    assert [timer.cancelled() for timer in set_] == [True, False]
