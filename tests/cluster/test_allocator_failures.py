"""Workers that die, come back, leave and join while tasks with models wait and run."""

from __future__ import annotations

import os
import signal

import dask
import pytest
from distributed import Client, KilledWorker, wait

import daskshare
from daskshare.errors import ModelLoadError
from daskshare.worker_plugin import DaskshareWorkerPlugin
from tests.cluster.conftest import TIMEOUT, start
from tests.cluster.stand_ins import (
    books,
    decisions,
    die,
    double,
    fake,
    no_hook_fails,
    open_gate,
    start_stand_ins,
    until,
    wait_at_gate,
    where,
)

GPUS = {0: "GPU-0", 1: "GPU-1"}
#: Of other tasks with it, before a worker's death counts against a task.
MODEL = fake("long-lived")


@pytest.fixture(scope="module")
def cluster(importable_by_subprocesses):
    with (
        dask.config.set(
            {
                "distributed.scheduler.validate": True,
                # A local cluster gives up a worker that dies twice in this time.
                "distributed.deploy.lost-worker-timeout": "1h",
            }
        ),
        start(n_workers=2, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        start_stand_ins(client, GPUS)
        daskshare.load(client, MODEL, replicas=2)
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as client, client.as_current():
        client.wait_for_workers(2, timeout=TIMEOUT)
        yield client
    with Client(cluster, set_as_default=False) as after:
        until(lambda: books(after)["held"] == 0, after)
        left = books(after)
        assert (left["in_pool"], left["deaths"]) == (0, 0)


def pids(client):
    return client.run(os.getpid)


def test_a_killed_workers_tasks_are_done_elsewhere_and_its_successor_is_used(client):
    before = pids(client)
    victim = min(before)
    futures = client.map(double, [MODEL] * 60, range(60), pure=False)
    after = client.map(double_plain, futures)
    wait(futures[:5], timeout=TIMEOUT, return_when="FIRST_COMPLETED")
    os.kill(before[victim], signal.SIGKILL)
    assert client.gather(after) == [4.0 * i for i in range(60)]
    until(lambda: len(books(client)["workers"]) == 2, client)
    # A nanny's worker has a new address and the old GPU.
    workers = books(client)["workers"]
    assert victim not in workers
    assert {w["device"] for w in workers.values()} == {"GPU-0", "GPU-1"}
    [new] = set(workers) - set(before)
    daskshare.load(client, MODEL, replicas=2)
    assert client.submit(where, MODEL, workers=[new], pure=False).result(TIMEOUT) == new


def double_plain(value):
    return 2 * value


def test_a_poisonous_task_is_not_blamed_on_its_neighbours(client):
    async def allow(dask_scheduler, failures):
        before, dask_scheduler.allowed_failures = dask_scheduler.allowed_failures, failures
        return before

    before = client.run_on_scheduler(allow, failures=1)
    try:
        good = client.map(double, [MODEL] * 5, range(5), pure=False, priority=1)
        poison = client.submit(die, MODEL, 0.0, pure=False, priority=1)
        more = client.map(double, [MODEL] * 40, range(40), pure=False)
        assert client.gather(good + more) == [2.0 * i for i in [*range(5), *range(40)]]
        with pytest.raises(KilledWorker):
            poison.result(TIMEOUT)
    finally:
        client.run_on_scheduler(allow, failures=before)
        client.wait_for_workers(2, timeout=TIMEOUT)


def test_a_restart_of_all_workers_forgets_all_tasks(client):
    futures = client.map(double, [MODEL] * 200, range(200), pure=False)
    wait(futures, timeout=TIMEOUT, return_when="FIRST_COMPLETED")
    before = set(client.scheduler_info()["workers"])
    client.restart(wait_for_workers=False)
    assert books(client)["held"] == 0
    assert books(client)["in_pool"] == 0
    until(lambda: len(set(books(client)["workers"]) - before) == 2, client)
    again = client.map(double, [MODEL] * 10, range(10), pure=False)
    assert client.gather(again) == [2.0 * i for i in range(10)]


def test_retired_workers_hand_their_tasks_over(client, cluster):
    leaving, staying = sorted(client.scheduler_info()["workers"])
    futures = client.map(double, [MODEL] * 60, range(60), pure=False)
    client.retire_workers([leaving], close_workers=True)
    assert client.gather(futures) == [2.0 * i for i in range(60)]
    until(lambda: set(books(client)["workers"]) == {staying}, client)
    cluster.scale(1)
    until(lambda: len(cluster.workers) == 1, client)
    cluster.scale(2)
    client.wait_for_workers(2, timeout=TIMEOUT)
    until(lambda: len(books(client)["workers"]) == 2, client)


def test_two_workers_on_one_device_share_its_budget(importable_by_subprocesses):
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        start(n_workers=2, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        start_stand_ins(client, {0: "MIG-7", 1: "MIG-7"}, total_bytes=1000)
        # Of 800 bytes for models two copies take 600, and a third model of 300 has to wait.
        one, two = fake("one", model_bytes=300), fake("two", model_bytes=300)
        assert len(daskshare.load(client, one, replicas=2)) == 2
        [(uuid, device)] = books(client)["devices"].items()
        assert (uuid, device["used_bytes"], device["budget_bytes"]) == ("MIG-7", 600, 800)
        with pytest.raises(ModelLoadError, match="ready on 0 workers"):
            daskshare.load(client, two, timeout_seconds=0.5)
        daskshare.unload(client, one)
        assert len(daskshare.load(client, two)) == 1
        assert books(client)["devices"]["MIG-7"]["used_bytes"] == 300


def test_an_adaptive_cluster_grows_for_held_tasks_and_shrinks_after_them():
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        start(n_workers=0, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        daskshare.install(client)
        future = client.submit(wait_at_gate, MODEL, "adaptive")
        until(lambda: books(client)["in_pool"] == 1, client)
        assert "worker" in daskshare.why(client, future)
        adaptive = cluster.adapt(minimum=0, maximum=2, interval="50ms", wait_count=2)
        until(lambda: any(w["in_flight"] for w in books(client)["workers"].values()), client)
        assert not future.done()
        client.run(open_gate, "adaptive")
        future.result(TIMEOUT)
        # A worker that holds the only copy of a result stays.
        future.release()
        until(lambda: not books(client)["workers"], client)
        adaptive.stop()


def test_an_allocator_that_comes_late_takes_over_what_is_there():
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        start(n_workers=1, threads_per_worker=2, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        client.register_plugin(DaskshareWorkerPlugin())
        resident = fake("resident")
        gates = client.map(wait_at_gate, [resident] * 2, gate="late", pure=False)
        # More than the cluster has threads: Dask queues them on its own.
        queued = client.map(double, [resident] * 40, range(40), pure=False)
        bound = client.submit(double, resident, 1.0, workers=["tcp://127.0.0.1:1"], pure=False)
        after = client.map(double_plain, queued)
        until(lambda: processing(client) >= 2, client)
        daskshare.install(client)
        until(lambda: books(client)["held"] == 43, client)
        until(lambda: books(client)["in_pool"] > 30, client)
        client.run(open_gate, "late")
        assert client.gather(after) == [4.0 * i for i in range(40)]
        client.gather(gates)
        assert not bound.done()
        # A copy that was there before is learned of, not loaded again.
        assert daskshare.stats(client).popitem()[1]["loads"] == 1
        assert len(decisions(client, resident)) >= 30


def processing(client):
    async def count(dask_scheduler):
        return sum(len(ws.processing) for ws in dask_scheduler.workers.values())

    return client.run_on_scheduler(count)


def test_resources_of_tasks_are_kept():
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        start(n_workers=1, processes=False, resources={"licence": 2}) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        daskshare.install(client)
        futures = client.map(
            count_together, [MODEL] * 12, range(12), resources={"licence": 1}, pure=False
        )
        assert max(client.gather(futures)) <= 2
        never = client.submit(double, MODEL, 1.0, resources={"licence": 3})
        until(lambda: books(client)["in_pool"] == 1, client)
        assert "resource" in daskshare.why(client, never) or "licence" in daskshare.why(
            client, never
        )


_running: list[float] = []


def count_together(model, value):
    _running.append(value)
    try:
        double(model, value)
        return len(_running)
    finally:
        _running.remove(value)


def test_cpu_workers_take_models_only_when_they_may(importable_by_subprocesses):
    with (
        dask.config.set({"daskshare.allocator.cpu-execution": False}),
        start(n_workers=1, threads_per_worker=2, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        daskshare.install(client)
        future = client.submit(double, MODEL, 1.0)
        until(lambda: len(books(client)["workers"]) == 1, client)
        until(lambda: books(client)["in_pool"] == 1, client)
        assert "GPU" in daskshare.why(client, future)
        assert client.submit(double_plain, 4).result(TIMEOUT) == 8
        assert not future.done()


def test_without_the_allocator_dask_decides():
    with (
        dask.config.set({"daskshare.allocator.enabled": False}),
        start(n_workers=1, threads_per_worker=2, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        assert client.submit(double, MODEL, 4.0).result(TIMEOUT) == 8.0
        with pytest.raises(daskshare.errors.ConfigurationError, match="places no models"):
            daskshare.why(client, "any")
        [report] = daskshare.stats(client).values()
        assert report["placement"] == {"failure": "", "decisions": []}
