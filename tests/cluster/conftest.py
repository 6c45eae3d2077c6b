"""One cluster of two worker processes for all tests that leave it whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import daskshare

ROOT = Path(__file__).parents[2]
#: Bound of every wait; nothing here should come near it.
TIMEOUT = 60
TASK_THREADS = 4


def start(**options) -> LocalCluster:
    return LocalCluster(
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
