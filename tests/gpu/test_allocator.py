"""Several workers on one GPU are one device; they run the main job with two models at once."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

import daskshare
from daskshare.client import SharedModel
from daskshare.results.parquet import read_detections
from daskshare.testing import FakeSpec
from tests.clip import traffic_clip
from tests.cluster.stand_ins import books, decisions, double, no_hook_fails, until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

TIMEOUT = 180
NUM_WORKERS = 3


@pytest.fixture(scope="module")
def cluster():
    with (
        # Three processes that compile at the same time would take most of the test.
        dask.config.set(
            {"daskshare.engine.compile": False, "distributed.scheduler.validate": True}
        ),
        LocalCluster(
            n_workers=NUM_WORKERS,
            threads_per_worker=4,
            processes=True,
            memory_limit=0,
            dashboard_address=":0",
        ) as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as client, no_hook_fails():
        client.wait_for_workers(NUM_WORKERS, timeout=TIMEOUT)
        daskshare.install(client)
        until(lambda: len(books(client)["workers"]) == NUM_WORKERS, client, steps=3600)
        yield client


def test_workers_on_one_gpu_are_one_device_with_one_budget(client):
    left = books(client)
    [(uuid, device)] = left["devices"].items()
    assert uuid.startswith(("GPU-", "MIG-"))
    assert device["is_gpu"]
    assert sorted(device["workers"]) == sorted(left["workers"])
    [budget] = {report["budget_bytes"] for report in daskshare.stats(client).values()}
    assert device["budget_bytes"] == budget
    # Two of three copies fit: the third would exceed what the GPU gives.
    model = SharedModel(FakeSpec(name="two-fifths", model_bytes=int(budget * 0.4)))
    assert len(daskshare.load(client, model, replicas=2)) == 2
    with pytest.raises(daskshare.errors.ModelLoadError, match="expected 3"):
        daskshare.load(client, model, replicas=3, timeout_seconds=5)
    assert books(client)["devices"][uuid]["used_bytes"] <= budget
    daskshare.unload(client, model)


def test_the_main_job_with_two_models_at_once(client, tmp_path):
    clips = [tmp_path / f"{name}.mp4" for name in "abcd"]
    for clip in clips:
        os.symlink(traffic_clip(), clip)
    models = {
        "large": daskshare.yolov3("yolov3-tiny"),
        "small": daskshare.yolov3("yolov3-tiny", input_size=320, classes=["person", "car"]),
    }

    def run(name):
        return daskshare.detect(
            clips, models[name], tmp_path / name, client=client, chunk_seconds=1, progress=False
        )

    with ThreadPoolExecutor(2) as pool:
        summaries = dict(zip(models, pool.map(run, models), strict=True))
    for name, summary in summaries.items():
        assert summary.failed == ()
        assert summary.frames == 4 * 250
        assert 1 <= summary.model_copies <= NUM_WORKERS
        table = read_detections(tmp_path / name)
        assert table.num_rows == summary.num_detections > 0
        videos = np.array(table["video"].to_pylist())
        counts = [int((videos == str(clip)).sum()) for clip in clips]
        # The four clips are one; batches differ, and with them the last bits of a confidence.
        assert max(counts) - min(counts) <= 0.01 * max(counts) + 1
        sent = decisions(client, models[name])
        assert len(sent) == summary.chunks
        assert all(d["reason"] for d in sent)
    left = books(client)
    assert left["in_pool"] == 0
    [device] = left["devices"].values()
    assert device["used_bytes"] <= device["budget_bytes"]


def test_a_killed_worker_of_the_gpu_loses_no_task(client):
    model = SharedModel(FakeSpec(name="survivor"))
    pids = client.run(os.getpid)
    futures = client.map(double, [model] * 60, range(60), pure=False)
    victim = min(pids)
    os.kill(pids[victim], signal.SIGKILL)
    assert client.gather(futures) == [2.0 * i for i in range(60)]
    until(
        lambda: (
            len(books(client)["workers"]) == NUM_WORKERS and victim not in books(client)["workers"]
        ),
        client,
        steps=3600,
    )
    assert len(books(client)["devices"]) == 1
