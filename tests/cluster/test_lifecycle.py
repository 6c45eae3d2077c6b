"""Workers that join late, die, restart, lack the plugin or cannot start it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import dask
import numpy as np
import pytest
from distributed import Client, Event

import daskshare
from daskshare.client import SharedModel
from daskshare.errors import NotOnWorkerError
from daskshare.testing import FakeSpec
from daskshare.worker_plugin import PLUGIN_NAME, worker_report
from tests.cluster.conftest import TIMEOUT, start

MODEL = SharedModel(FakeSpec(name="long-lived"))
ONES = np.ones((1, 2))


def pid():
    return os.getpid()


def wait_then_call(model, value):
    assert Event("go").wait(TIMEOUT)
    return model(np.full((1, 2), value))


def share_id():
    from daskshare.worker_plugin import local_share

    return id(local_share())


def torch_threads(model):
    model(np.ones((1, 2)))
    import torch

    return torch.get_num_threads()


def call_on(client, workers):
    return {w: client.submit(MODEL, ONES, workers=[w], pure=False).result(TIMEOUT) for w in workers}


def workers_when(client, condition):
    """Addresses of the workers as soon as they meet a condition."""

    async def poll(dask_scheduler):
        async with asyncio.timeout(TIMEOUT):
            while not condition(list(dask_scheduler.workers)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return list(dask_scheduler.workers)

    return client.run_on_scheduler(poll)


@pytest.fixture(scope="module")
def cluster(importable_by_subprocesses):
    with start() as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as client, client.as_current():
        client.wait_for_workers(1, timeout=TIMEOUT)
        yield client


# The tests of this class tell one story, in order.
class TestOneCluster:
    def test_without_the_plugin_the_task_says_what_to_do(self, client):
        future = client.submit(MODEL, ONES, pure=False)
        with pytest.raises(NotOnWorkerError, match=r"daskshare\.install\(client\)"):
            future.result(TIMEOUT)
        [report] = daskshare.stats(client).values()
        assert report["state"] == "absent"

    def test_installing_while_tasks_run_and_twice(self, client):
        future = client.submit(wait_then_call, MODEL, 3)
        daskshare.install(client)
        Event("go", client=client).set()
        assert future.result(TIMEOUT)[0, 0] == 6
        share = client.submit(share_id, pure=False).result(TIMEOUT)
        daskshare.install(client)
        with Client(client.scheduler.address, set_as_default=False) as second:
            daskshare.install(second)
        # Replaced, the share would have lost its models.
        assert client.submit(share_id, pure=False).result(TIMEOUT) == share
        [report] = daskshare.stats(client).values()
        assert report["loads"] == 1

    def test_a_worker_preload_besides_loses_no_model(self, client):
        from daskshare.worker_plugin import DaskshareWorkerPlugin

        share = client.submit(share_id, pure=False).result(TIMEOUT)
        client.register_plugin(DaskshareWorkerPlugin())
        assert client.submit(share_id, pure=False).result(TIMEOUT) == share
        assert client.submit(MODEL, ONES, pure=False).result(TIMEOUT)[0, 0] == 2
        [report] = daskshare.stats(client).values()
        assert report["loads"] == 1

    def test_a_late_joiner_gets_the_plugin(self, client, cluster):
        cluster.scale(2)
        client.wait_for_workers(2, timeout=TIMEOUT)
        workers = list(client.scheduler_info()["workers"])
        assert {w: r[0, 0] for w, r in call_on(client, workers).items()} == dict.fromkeys(
            workers, 2.0
        )
        assert {r["state"] for r in daskshare.stats(client).values()} == {"ready"}

    def test_the_scheduler_knows_each_workers_state(self, client):
        async def state(dask_scheduler):
            return await dask_scheduler.plugins[PLUGIN_NAME].get_state()

        workers = set(client.scheduler_info()["workers"])
        state = client.run_on_scheduler(state)
        assert set(state) == workers
        # The event comes at once; the report rides on heartbeats, and may not have come yet.
        assert {s["event"]["action"] for s in state.values()} <= {"started", "loaded"}
        assert {s.get("state", "ready") for s in state.values()} <= {"ready", "starting"}

    def test_a_killed_worker_comes_back_and_works(self, client):
        before = client.run(pid)
        victim = min(before)
        futures = client.map(MODEL, [np.full((1, 2), i) for i in range(40)], pure=False)
        os.kill(before[victim], signal.SIGKILL)
        assert [r[0, 0] for r in client.gather(futures)] == [2.0 * i for i in range(40)]
        workers = workers_when(client, lambda workers: len(workers) == 2 and victim not in workers)
        assert before[victim] not in client.run(pid).values()
        assert all(r[0, 0] == 2 for r in call_on(client, workers).values())

    def test_a_restart_of_all_workers_keeps_the_plugin(self, client):
        client.restart(timeout=TIMEOUT)
        client.wait_for_workers(2, timeout=TIMEOUT)
        results = client.gather(client.map(MODEL, [ONES * i for i in range(8)], pure=False))
        assert [r[0, 0] for r in results] == [2.0 * i for i in range(8)]

    def test_unregistering_closes_the_share(self, client):
        client.unregister_worker_plugin(PLUGIN_NAME)
        with pytest.raises(NotOnWorkerError, match="has no daskshare plugin"):
            client.submit(MODEL, ONES, pure=False).result(TIMEOUT)
        assert {r["state"] for r in daskshare.stats(client).values()} == {"absent"}


def test_a_worker_that_cannot_start_says_why_in_each_task():
    # Workers take over this process's configuration.
    with (
        dask.config.set({"daskshare.share.memory-limit": "a lot"}),
        start() as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        for _ in range(2):
            future = client.submit(MODEL, ONES, pure=False)
            with pytest.raises(NotOnWorkerError, match="'a lot'") as caught:
                future.result(TIMEOUT)
            assert caught.value.reason.startswith("ConfigurationError")
        [report] = daskshare.stats(client).values()
        assert report["state"] == "failed"
        assert "'a lot'" in report["reason"]
        # Other tasks do not care.
        assert client.submit(sum, [1, 2]).result(TIMEOUT) == 3

        async def state(dask_scheduler):
            return await dask_scheduler.plugins[PLUGIN_NAME].get_state()

        [known] = client.run_on_scheduler(state).values()
        assert known["event"]["action"] == "failed"


def test_workers_of_one_process_share_one_copy():
    with (
        start(processes=False, n_workers=2, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        workers = list(client.scheduler_info()["workers"])
        assert len(workers) == 2
        assert all(r[0, 0] == 2 for r in call_on(client, workers).values())
        reports = daskshare.stats(client)
        assert [r["loads"] for r in reports.values()] == [1, 1]
        cluster.scale(1)
        [left] = workers_when(client, lambda workers: len(workers) == 1)
        # The worker that left was not the share's last owner.
        assert call_on(client, [left])[left][0, 0] == 2
        assert daskshare.stats(client)[left]["loads"] == 1
    assert worker_report()["state"] == "absent"
    assert not [t for t in threading.enumerate() if t.name.startswith("daskshare-engine")]


def test_an_asynchronous_client_and_local_cluster():
    async def run():
        async with (
            daskshare.local_cluster(
                device="cpu", dashboard_address=":0", asynchronous=True
            ) as cluster,
            Client(cluster, asynchronous=True, set_as_default=False) as client,
        ):
            await daskshare.install(client)
            await daskshare.install(client)
            result = await client.submit(MODEL, ONES)
            threads = await client.submit(torch_threads, MODEL)
            return result, threads, await daskshare.stats(client)

    result, threads, stats = asyncio.run(run())
    assert result[0, 0] == 2
    # One worker process, whose engine computes with all cores, whatever the nanny's environment.
    assert threads == dask.system.CPU_COUNT
    [report] = stats.values()
    assert (report["state"], report["frames"]) == ("ready", 2)
    assert report["device"]["kind"] == "cpu"


def test_many_tasks_race_through_one_engine_and_keep_their_results():
    with (
        daskshare.local_cluster(processes=False, device="cpu", dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        batches = [np.full((1 + i % 5, 2), i) for i in range(200)]
        results = client.gather(client.map(MODEL, batches, pure=False))
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, np.full((1 + i % 5, 2), 2.0 * i))
        [report] = daskshare.stats(client).values()
        assert report["frames"] == sum(1 + i % 5 for i in range(200))


def test_several_workers_divide_the_cores():
    with (
        daskshare.local_cluster(
            n_workers=dask.system.CPU_COUNT,
            device="cpu",
            dashboard_address=":0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        assert client.submit(torch_threads, MODEL).result(TIMEOUT) == 1
