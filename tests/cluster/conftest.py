"""One cluster of two worker processes for all tests that leave it whole."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster, Nanny, Status

import daskshare

ROOT = Path(__file__).parents[2]
#: Bound of every wait; nothing here should come near it.
TIMEOUT = 60
TASK_THREADS = 4


class WholeCluster(LocalCluster):
    """Closes only when no worker that was killed is on its way back.

    A nanny that is told to close while it starts a worker waits for that one without a bound. One
    whose worker dies before it has heard of its start waits for ever: kill those that `is_up`.
    """

    def close(self, timeout=None):
        if not self.asynchronous and self.status is Status.running:
            deadline = time.monotonic() + TIMEOUT
            while restarting := [n for n in self.workers.values() if _restarts(n)]:
                assert time.monotonic() < deadline, f"workers that do not come back: {restarting}"
                self.sync(_one_step)
        return super().close(timeout)


def _restarts(nanny):
    return isinstance(nanny, Nanny) and nanny.status is Status.running and not is_up(nanny)


def is_up(nanny):
    """Whether a nanny knows that its worker runs."""
    process = nanny.process
    return process is not None and process.status is Status.running and nanny.is_alive()


async def _one_step():
    """Let the cluster's event loop go on, as its nannies poll there."""
    await asyncio.sleep(0.02)


def start(**options) -> LocalCluster:
    return WholeCluster(
        **{
            "n_workers": 1,
            "threads_per_worker": TASK_THREADS,
            "processes": True,
            "dashboard_address": ":0",
            "memory_limit": 0,
            **options,
        }
    )


@pytest.fixture(scope="session", autouse=True)
def importable_by_subprocesses():
    """Let workers import daskshare from this source tree, installed or not."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def two_workers(importable_by_subprocesses):
    with start(n_workers=2) as cluster, Client(cluster) as client:
        daskshare.install(client)
        yield cluster


@pytest.fixture
def client(two_workers):
    """A client of the cluster that all tests share."""
    with Client(two_workers, set_as_default=False) as client, client.as_current():
        yield client
