"""What tests/gpu/test_many_gpus.py asks of real GPUs, asked of stand-ins."""

from __future__ import annotations

import dask
import pytest
from distributed import Client

from tests.cluster.conftest import TIMEOUT, start
from tests.cluster.stand_ins import books, no_hook_fails, start_stand_ins, until
from tests.many_devices import pinned_workers, serve_unequal_demand, share_one_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_unequal_demand_on_four_devices_of_which_one_dies(importable_by_subprocesses):
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        start(n_workers=4, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        start_stand_ins(client, {number: f"GPU-{number}" for number in range(4)})
        until(lambda: len(books(client)["workers"]) == 4, client)
        serve_unequal_demand(client, rounds=1)


def test_two_workers_on_one_device_beside_one_on_another(importable_by_subprocesses):
    devices = {"first": "MIG-7", "second": "MIG-7", "third": "MIG-8"}
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        pinned_workers({name: {} for name in devices}) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        client.wait_for_workers(3, timeout=TIMEOUT)
        start_stand_ins(client, devices)
        until(lambda: len(books(client)["workers"]) == 3, client)
        share_one_device(client, devices, shared="MIG-7", other="MIG-8")
