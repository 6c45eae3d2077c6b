import threading
import time

import pytest
from distributed import Client, Event, LocalCluster

from daskshare.errors import DaskshareError
from daskshare.results.dispatch import Dispatcher
from daskshare.results.progress import TOPIC, subscribe


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def double(item):
    if item == 3:
        raise ValueError("three")
    return 2 * item


def test_each_item_comes_once_with_its_result_or_error(client):
    dispatcher = Dispatcher(client)
    got = {}
    for item, future in dispatcher.completed(
        range(100), lambda i: client.submit(double, i, pure=False)
    ):
        got[item] = future.exception() if future.status == "error" else future.result()
    assert str(got.pop(3)) == "three"
    assert got == {i: 2 * i for i in range(100) if i != 3}


def test_tasks_in_flight_are_bounded(client):
    dispatcher = Dispatcher(client, per_thread=3)
    submitted = 0
    done = 0
    most = 0

    def submit(item):
        nonlocal submitted, most
        submitted += 1
        most = max(most, submitted - done)
        return client.submit(double, item + 10, pure=False)

    for _ in dispatcher.completed(range(200), submit):
        done += 1
    assert (submitted, done) == (200, 200)
    assert most <= 16


def test_messages_arrive_in_the_iterating_thread_between_ends(client):
    seen = []
    gate = Event("gate", client=client)

    def on_message(message):
        seen.append((message, threading.current_thread()))
        gate.set()

    dispatcher = Dispatcher(client, on_message=on_message)
    with subscribe(client, "run-1", dispatcher.post):
        for _ in dispatcher.completed(["t"], lambda name: client.submit(report, "run-1", name)):
            pass
    ((message, thread),) = seen
    assert (message["run"], message["task"], message["frames"]) == ("run-1", "t", 7)
    assert thread is threading.current_thread()


def report(run, task):
    from distributed import get_worker

    get_worker().log_event(TOPIC, {"run": "another", "task": task, "frames": 1})
    get_worker().log_event(TOPIC, {"run": run, "task": task, "frames": 7})
    # Ends only when the message was seen: it must not need the task's end to be handled.
    assert Event("gate").wait(timeout=30)


def test_cancel_takes_back_what_waits(client):
    dispatcher = Dispatcher(client)
    gate = Event("never", client=client)
    ended = dispatcher.completed(
        range(20), lambda i: client.submit(double if i == 0 else wait_for, i, pure=False)
    )
    assert next(ended)[0] == 0
    dispatcher.cancel()

    gate.set()
    # Cancelling may overtake the submission; then releasing the futures takes the tasks back.
    deadline = time.monotonic() + 30
    while client.run_on_scheduler(unfinished):
        assert time.monotonic() < deadline


def unfinished(dask_scheduler):
    return [ts.key for ts in dask_scheduler.tasks.values() if ts.state != "memory"]


def wait_for(item):
    assert Event("never").wait(timeout=30)


def test_a_cancelled_task_is_a_lost_cluster(client):
    dispatcher = Dispatcher(client)

    def submit(item):
        future = client.submit(wait_for, item, pure=False)
        future.cancel()
        return future

    with pytest.raises(DaskshareError, match="finished chunks are kept"):
        next(dispatcher.completed([1], submit))
