"""Which endpoint a client is told to use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from distributed import Status
from distributed.metrics import time

from daskshare._allocator_endpoints import Endpoints, rank_endpoints
from daskshare.worker_plugin import PLUGIN_NAME

HERE = {"127.0.0.1", "10.0.0.1"}


def worker(
    name, *, sessions=0, tasks=0, queue=0, device="", status="running", models=("m",), seen=0.0
):
    """A worker on the machine 10.0.0.N whose endpoint has the port 1."""
    report = {
        "models": {
            key: {"name": f"name of {key}", "state": "ready", "engine": {"queue_frames": queue}}
            for key in models
        },
        "device": {"uuid": device or f"GPU-{name}"},
        "flight": {"location": f"grpc://10.0.0.{name}:1", "sessions": sessions},
    }
    return SimpleNamespace(
        address=f"tcp://10.0.0.{name}:9",
        metrics={PLUGIN_NAME: report},
        processing=dict.fromkeys(range(tasks)),
        status=Status[status],
        last_seen=time() - seen,
    )


def endpoints(*workers, failures=()):
    scheduler = SimpleNamespace(workers={ws.address: ws for ws in workers})
    book = SimpleNamespace(failure=lambda address: "no driver" if address in failures else "")
    return Endpoints(scheduler, SimpleNamespace(workers=book))


def order(found, model="m", hosts=(), at=0.0):
    ranked = found.rank(model, hosts, now_seconds=at)
    return [location.removeprefix("grpc://10.0.0.").removesuffix(":1") for location in ranked]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"sessions": 1}, {"sessions": 2}),
        ({"tasks": 1}, {"sessions": 1, "tasks": 1}),
        ({"queue": 3}, {"queue": 40}),
        ({}, {"models": ()}),
        # As many clients as it takes to keep a device busy are not worth a load.
        ({"sessions": 1}, {"models": ()}),
        ({"models": ()}, {"sessions": 3}),
        ({"sessions": 9}, {"status": "closing_gracefully"}),
        ({"sessions": 9}, {"seen": 60.0}),
    ],
)
def test_one_worker_before_another(better, worse):
    assert order(endpoints(worker("3", **worse), worker("4", **better))) == ["4", "3"]
    assert order(endpoints(worker("3", **better), worker("4", **worse))) == ["3", "4"]


def test_the_clients_own_machine_comes_first_however_busy():
    found = endpoints(worker("2"), worker("1", sessions=30, models=()))
    assert order(found, hosts=HERE) == ["1", "2"]


def test_a_model_is_known_by_its_key_or_its_name():
    found = endpoints(worker("3", models=("x",)), worker("4", models=("m",)))
    assert order(found, "name of m") == ["4", "3"]
    assert order(found, "name of x", at=10.0) == ["3", "4"]
    # Without one, no worker is preferred for what it has.
    assert order(endpoints(worker("3", models=()), worker("4")), None) == ["3", "4"]


def test_workers_of_one_device_share_its_clients():
    both = [worker("3", device="GPU"), worker("4", device="GPU", sessions=5)]
    assert order(endpoints(*both, worker("5", sessions=4))) == ["5", "3", "4"]


def test_a_worker_that_cannot_run_models_comes_last():
    found = endpoints(worker("3"), worker("4", sessions=9), failures={"tcp://10.0.0.3:9"})
    assert order(found) == ["4", "3"]


def test_tasks_that_begin_at_once_are_spread_before_reports_tell_of_them():
    found = endpoints(worker("3"), worker("4"))
    assert [order(found)[0] for _ in range(6)] == ["3", "4"] * 3
    # Later the reports count, and one that left is forgotten.
    assert order(found, at=100.0)[0] == "3"
    found.forget("tcp://10.0.0.3:9")
    assert order(found, at=100.0)[0] == "3"


def test_a_worker_without_an_endpoint_is_none():
    silent = worker("3")
    del silent.metrics[PLUGIN_NAME]["flight"]
    joining = worker("4")
    joining.metrics = {}
    assert order(endpoints(silent, joining)) == []


def test_a_scheduler_without_the_plugin_ranks_by_reports_alone():
    workers = [worker("3", sessions=1), worker("4")]
    scheduler = SimpleNamespace(workers={ws.address: ws for ws in workers}, plugins={})
    assert rank_endpoints("m", [], scheduler) == ["grpc://10.0.0.4:1", "grpc://10.0.0.3:1"]


def test_a_worker_whose_first_report_is_not_made_yet_has_no_models():
    young, old = worker("3"), worker("4")
    young.metrics[PLUGIN_NAME] = {"flight": young.metrics[PLUGIN_NAME]["flight"]}
    assert order(endpoints(young, old)) == ["4", "3"]
