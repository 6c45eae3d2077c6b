"""What the doctor says about made-up clusters; tests/cluster asks a real one."""

from __future__ import annotations

import dataclasses

import pytest

from daskshare.doctor.cluster import Cluster, diagnose_cluster
from daskshare.doctor.findings import Status
from tests.unit.doctor.test_checks import CPU, GPU, change, of

WORKER = "tcp://10.0.0.7:4000"
CLUSTER = Cluster(
    python="3.11.9",
    packages=CPU.packages,
    scheduler_python="3.11.7",
    scheduler_packages=CPU.packages,
    plugin=True,
    workers={WORKER: CPU},
    threads={WORKER: 16},
)


def test_a_whole_cluster():
    report = diagnose_cluster(CLUSTER)
    assert list(report) == ["scheduler", WORKER]
    assert {c.status for checks in report.values() for c in checks} == {Status.OK, Status.ABSENT}


@pytest.mark.parametrize(
    ("changes", "name", "status", "found"),
    [
        ({"plugin": False}, "plugin", Status.WARNING, "not installed on this cluster"),
        ({"workers": {}}, "workers", Status.ERROR, "none"),
        ({"scheduler_python": "3.12.1"}, "python", Status.ERROR, "3.12 there, 3.11 here"),
        (
            {"scheduler_packages": {**CPU.packages, "dask": "2026.8.0"}},
            *("dask", Status.ERROR, "2026.8.0 there, 2026.7.1 here"),
        ),
        (
            {"scheduler_packages": {"dask": "2026.7.1"}},
            *("daskshare", Status.ERROR, "none there, 0.1.0 here"),
        ),
    ],
)
def test_the_scheduler(changes, name, status, found):
    check = of(diagnose_cluster(dataclasses.replace(CLUSTER, **changes))["scheduler"], name)
    assert (check.status, bool(check.fix)) == (status, True)
    assert found in check.found


def test_a_worker_that_cannot_answer():
    cluster = dataclasses.replace(
        CLUSTER, workers={WORKER: "ModuleNotFoundError: No module named 'daskshare'"}
    )
    [check] = diagnose_cluster(cluster)[WORKER]
    assert check.status is Status.ERROR
    assert "No module named 'daskshare'" in check.found


def test_a_worker_of_another_release():
    other = change(CPU, packages={"distributed": "2026.8.0"})
    checks = diagnose_cluster(dataclasses.replace(CLUSTER, workers={WORKER: other}))[WORKER]
    assert of(checks, "distributed").found == "2026.8.0 there, none here"


@pytest.mark.parametrize(("threads", "told"), [(1, True), (16, False)])
def test_a_gpu_worker_with_few_threads(threads, told):
    cluster = dataclasses.replace(CLUSTER, workers={WORKER: GPU}, threads={WORKER: threads})
    names = [check.name for check in diagnose_cluster(cluster)[WORKER]]
    assert ("threads" in names) is told


def test_what_is_required_is_required_of_workers():
    report = diagnose_cluster(CLUSTER, needs=["gpu"])
    assert of(report[WORKER], "GPU").status is Status.ERROR
