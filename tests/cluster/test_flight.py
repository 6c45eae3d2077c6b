"""Workers' Arrow Flight endpoints as a Spark task finds and uses them."""

from __future__ import annotations

import os
import signal
import socket
import time

import dask.config
import numpy as np
import pytest
from distributed import Client

import daskshare
from daskshare.errors import HostError
from daskshare.flight import connect_flight
from daskshare.spark import cluster as spark_cluster
from daskshare.spark.cluster import connect_cluster, find_endpoints
from tests.cluster.conftest import TIMEOUT, start
from tests.cluster.test_host import load_scaled, wait_until


@pytest.fixture
def served(tmp_path):
    """A cluster of two workers with endpoints, in a folder of sockets of their own."""
    # What this process is configured with, nannies give to their workers.
    options = {"host.directory": str(tmp_path), "flight.port": 0, "flight.allow-code": True}
    with (
        dask.config.set({f"daskshare.{name}": value for name, value in options.items()}),
        start(n_workers=2) as cluster,
        Client(cluster) as client,
    ):
        daskshare.install(client)

        def endpoints():
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            return ["flight" in worker["metrics"].get("daskshare", {}) for worker in workers]

        # Not by find_endpoints: whoever asks is counted as a client for some seconds.
        assert wait_until(lambda: endpoints() == [True, True])
        yield cluster.scheduler_address


def test_endpoints_are_found_used_and_found_again_after_a_restart(served):
    address = served
    spec = daskshare.share(load_scaled, name="scaled").spec
    before = find_endpoints(address)
    assert all(location.startswith("grpc://127.0.0.1:") for location in before)
    with connect_flight(lambda: find_endpoints(address), address, allow_code=True) as remote:
        model = remote.open(spec)
        assert model.infer(np.ones((2, 3))).shape == (2, 3)
        used = remote.host["pid"]
        os.kill(used, signal.SIGKILL)
        # The other worker answers; the killed one comes back at another port.
        assert model.infer(np.ones((3, 3))).shape == (3, 3)
        assert remote.host["pid"] != used
    assert wait_until(lambda: len(now := find_endpoints(address)) == 2 and set(now) != set(before))


def test_a_worker_on_the_same_machine_is_used_through_shared_memory(served, tmp_path, monkeypatch):
    address = served
    monkeypatch.setattr(spark_cluster, "task_device", lambda: "cpu")
    spec = daskshare.share(load_scaled, name="scaled").spec
    assert wait_until(lambda: (tmp_path / "cpu.sock").exists())
    with connect_cluster(address, allow_code=True) as near:
        assert near._link.shares_memory
        model = near.open(spec)
        array = np.ones((1000, 1000))
        assert model.infer(array).shape == array.shape
        # Its worker dies with the request in shared memory: the rest goes by Flight.
        number = near.submit("infer", value=array, model=model)
        os.kill(near.host["pid"], signal.SIGKILL)
        monkeypatch.setattr(spark_cluster, "connect", lambda address: None)
        assert near.result(number).shape == array.shape
        assert model.infer(array).shape == array.shape
        # A cluster does not like to be closed while it restarts a worker.
        assert wait_until(lambda: len(find_endpoints(address)) == 2)


def test_a_cluster_that_is_gone_is_an_error_with_its_address_in_time(monkeypatch):
    monkeypatch.setattr(spark_cluster, "task_device", lambda: "cpu")
    monkeypatch.setattr(spark_cluster, "connect", lambda address: None)
    started = time.monotonic()
    with pytest.raises(HostError, match=r"tcp://127\.0\.0\.1:9 does not answer") as caught:
        connect_cluster("tcp://127.0.0.1:9")
    assert caught.value.address == "tcp://127.0.0.1:9"
    assert time.monotonic() - started < TIMEOUT


def test_a_scheduler_that_takes_connections_and_never_answers_is_named():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with (
            dask.config.set({"daskshare.flight.timeout": "500ms"}),
            pytest.raises(HostError, match=f"{address} does not answer within 0.5 s"),
        ):
            find_endpoints(address)


def test_the_worker_that_has_the_model_is_preferred(served):
    model = daskshare.share(load_scaled, name="scaled")
    with Client(served) as client:
        [holder] = daskshare.load(client, model)
        pid = client.run(os.getpid)[holder]

        def reported():
            workers = client.scheduler_info(n_workers=-1)["workers"]
            models = workers[holder]["metrics"]["daskshare"].get("models", {})
            return models.get(model.key, {}).get("state") == "ready"

        assert wait_until(reported)
    for wanted in (model.key, "scaled"):
        locations = find_endpoints(served, wanted)
        assert len(locations) == 2
        with connect_flight(lambda found=locations: found, served) as remote:
            assert remote.host["pid"] == pid


def test_a_cluster_without_endpoints_says_what_to_set(client):
    address = client.scheduler_info()["address"]
    with pytest.raises(HostError, match=r"it has none.*daskshare\.flight\.port"):
        connect_flight(lambda: find_endpoints(address), address)
