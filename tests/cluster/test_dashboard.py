"""Page, panes, JSON route and metrics on real schedulers and workers."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
from bokeh.client import pull_session
from distributed import Client, Scheduler
from prometheus_client.parser import text_string_to_metric_families

import daskshare
from daskshare.client import SharedModel
from daskshare.dashboard.metrics import SCHEDULER_METRICS
from daskshare.scheduler_plugin import install_on_scheduler
from daskshare.testing import FakeSpec
from tests.cluster.conftest import TIMEOUT, start
from tests.cluster.test_preload import SCHEDULER_SCRIPT, cluster

PANES = {
    "/individual-daskshare-models-on-gpus",
    "/individual-daskshare-gpu-time",
    "/individual-daskshare-gpu-memory",
    "/individual-daskshare-queues",
    "/individual-daskshare-throughput",
    "/individual-daskshare-batch-sizes",
    "/individual-daskshare-models",
}
MODEL = SharedModel(FakeSpec(name="watched", model_bytes=3_000_000))
#: Handed over in each call; a worker may report while it has done a part of them.
FRAMES = 10


def base_url(client):
    parts = urlsplit(client.dashboard_link)
    return f"{parts.scheme}://{parts.hostname}:{parts.port}"


def get(url):
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return answer.read().decode()


def snapshot_when(client, condition):
    """What the JSON route gives, as soon as workers' heartbeats brought what is waited for."""

    async def poll(dask_scheduler):
        async with asyncio.timeout(TIMEOUT):
            feed = dask_scheduler.plugins["daskshare"].feed
            while not condition(feed.snapshot().as_dict()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return dask_scheduler.http_server.port

    port = client.run_on_scheduler(poll)
    return json.loads(get(f"http://127.0.0.1:{port}/json/daskshare.json"))


def call_everywhere(client, model=MODEL, frames=FRAMES):
    workers = list(client.scheduler_info()["workers"])
    futures = [client.submit(model, np.ones((frames, 2)), workers=[w], pure=False) for w in workers]
    client.gather(futures)
    return workers


def watched_on_each(snapshot, frames=FRAMES):
    return bool(snapshot["gpus"]) and all(
        any(m["name"] == "watched" and m["frames"] >= frames for m in gpu["models"].values())
        for gpu in snapshot["gpus"]
    )


def worker_urls(client):
    async def urls(dask_scheduler):
        return {
            address: f"http://{state.host}:{state.services['dashboard']}"
            for address, state in dask_scheduler.workers.items()
        }

    return client.run_on_scheduler(urls)


def scrape(url):
    """Samples by name, each a list of (labels, value); the official parser reads them."""
    found = {}
    for family in text_string_to_metric_families(get(f"{url}/metrics")):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def of_model(samples, name):
    return {
        tuple(v for k, v in labels.items() if k not in ("model", "key")): value
        for labels, value in samples[name]
        if labels["model"] == "watched"
    }


def check_dashboard(client):
    base = base_url(client)
    listed = json.loads(get(f"{base}/individual-plots.json"))
    assert set(listed.values()) >= PANES
    assert {"/individual-task-stream", "/individual-progress"} <= set(listed.values())
    for page in ("status", "workers", "daskshare", "info/main/workers.html"):
        assert ">Daskshare<" in get(f"{base}/{page}") or page.startswith("info"), page
    # As a browser does it: over the websocket, with figures in the document.
    for page in ("/daskshare", *sorted(PANES)):
        session = pull_session(url=f"{base}{page}")
        try:
            assert session.document.roots, page
        finally:
            session.close()


# Dask's pages come from processes of their own: bokeh's switch for validation is one for all
# threads of a process, and here several schedulers run in threads.
def test_installed_on_a_running_cluster(tmp_path):
    with cluster(tmp_path, workers=2) as client:
        daskshare.install(client)
        workers = call_everywhere(client)
        state = snapshot_when(client, watched_on_each)
        check_dashboard(client)
        # Installing again adds nothing twice.
        daskshare.install(client)
        menu = get(f"{base_url(client)}/status")
    assert menu.count('href="daskshare"') == 1

    assert {gpu["workers"][0] for gpu in state["gpus"]} == set(workers)
    [model] = [m for m in state["models"] if m["name"] == "watched"]
    assert model["copies"] == 2
    assert model["bytes"] == 2 * 3_000_000
    assert model["frames"] >= 2 * FRAMES
    assert {gpu["state"] for gpu in state["gpus"]} == {"ready"}


def test_from_a_preload(tmp_path):
    with cluster(tmp_path, scheduler=("--preload", SCHEDULER_SCRIPT)) as client:
        check_dashboard(client)
        call_everywhere(client)
        [model] = snapshot_when(client, watched_on_each)["models"]
        assert (model["name"], model["copies"]) == ("watched", 1)


def test_metrics_of_workers_and_scheduler(client):
    for frames in (1, 2, 3):
        workers = call_everywhere(client, frames=frames)
    snapshot_when(client, lambda snapshot: watched_on_each(snapshot, 1 + 2 + 3))
    stats = daskshare.stats(client)
    urls = worker_urls(client)
    assert set(urls) == set(workers)
    for address, url in urls.items():
        samples = scrape(url)
        assert of_model(samples, "daskshare_model_state")["ready",] == 1.0
        assert sum(of_model(samples, "daskshare_model_state").values()) == 1.0
        [watched] = [m for m in stats[address]["models"].values() if m["name"] == "watched"]
        # Metrics are as old as a heartbeat, and no younger than what was asked anew.
        assert 0 < of_model(samples, "daskshare_model_frames_total")[()] <= watched["frames"]
        assert of_model(samples, "daskshare_model_memory_bytes")[()] == 3_000_000
        assert of_model(samples, "daskshare_model_loads_total")[()] == 1
        buckets = of_model(samples, "daskshare_model_batch_frames_bucket")
        count = of_model(samples, "daskshare_model_batch_frames_count")[()]
        assert buckets["+Inf",] == count > 0
        assert sorted(buckets.values()) == [
            buckets[le,] for le in sorted((k[0] for k in buckets), key=float)
        ]
        times = {labels["state"]: v for labels, v in samples["daskshare_device_time_seconds_total"]}
        assert set(times) == {"busy", "loading", "decoding", "input", "scheduler"}
        assert times["scheduler"] > 0
        # Dask's own metrics are still there.
        assert "dask_worker_threads" in samples

    samples = scrape(base_url(client))
    assert of_model(samples, "daskshare_scheduler_model_copies") == {
        ("ready",): 2.0,
        ("loading",): 0.0,
        ("failed",): 0.0,
    }
    states = {labels["state"]: v for labels, v in samples["daskshare_scheduler_devices"]}
    assert states == {"ready": 2.0, "starting": 0.0, "failed": 0.0, "absent": 0.0}
    assert "dask_scheduler_workers" in samples


def test_a_model_that_cannot_be_loaded_is_shown_as_failed(client):
    broken = SharedModel(FakeSpec(name="broken", load_error="no weights"))
    futures = client.map(broken, [np.ones((1, 2))], pure=False, retries=0)
    assert isinstance(futures[0].exception(TIMEOUT), daskshare.errors.ModelLoadError)
    state = snapshot_when(client, lambda s: any(m["failed"] for m in s["models"]))
    [model] = [m for m in state["models"] if m["name"] == "broken"]
    assert (model["copies"], model["failed"]) == (0, 1)
    assert "no weights" in model["error"]


def test_without_a_dashboard_the_numbers_remain():
    with (
        start(scheduler_kwargs={"dashboard": False}, processes=False) as local,
        Client(local, set_as_default=False) as client,
    ):
        daskshare.install(client)
        call_everywhere(client)
        state = snapshot_when(client, watched_on_each)
        port = local.scheduler.http_server.port
        assert [m["copies"] for m in state["models"]] == [1]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"http://127.0.0.1:{port}/daskshare")


def test_workers_of_one_process_are_one_device():
    with (
        start(processes=False, n_workers=2, threads_per_worker=2) as local,
        Client(local, set_as_default=False) as client,
    ):
        daskshare.install(client)
        call_everywhere(client)
        state = snapshot_when(client, watched_on_each)
        [gpu] = state["gpus"]
        assert len(gpu["workers"]) == 2
        assert state["totals"]["copies"] == 1


def test_behind_a_proxys_prefix():
    async def run():
        async with Scheduler(
            host="127.0.0.1",
            port=0,
            dashboard_address="127.0.0.1:0",
            http_prefix="/proxy/8787",
        ) as scheduler:
            await install_on_scheduler(scheduler)
            base = f"http://127.0.0.1:{scheduler.http_server.port}/proxy/8787"
            pages = [f"{base}/daskshare", *(f"{base}{url}" for url in sorted(PANES))]
            return await asyncio.gather(
                *(asyncio.to_thread(get, url) for url in (*pages, f"{base}/json/daskshare.json"))
            )

    *pages, numbers = asyncio.run(run())
    assert all("bokeh" in page for page in pages)
    assert json.loads(numbers)["gpus"] == []


def test_the_last_scheduler_of_a_process_leaves_no_metrics():
    async def run():
        async with Scheduler(
            host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0"
        ) as scheduler:
            await install_on_scheduler(scheduler)
            plugin = scheduler.plugins["daskshare"]
            assert id(plugin) in SCHEDULER_METRICS._sources
        return plugin

    assert id(asyncio.run(run())) not in SCHEDULER_METRICS._sources
