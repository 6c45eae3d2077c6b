"""Shared models on dask-cuda's workers."""

from __future__ import annotations

import numpy as np
import pytest
from distributed import Client

import daskshare
from daskshare.errors import InvalidInputError
from tests.clip import traffic_clip

pytestmark = pytest.mark.gpu

TIMEOUT = 120
ITEMS = np.random.default_rng(0).random((64, 6), dtype=np.float32)


def load_net(device):
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


def call_with_torch(model, items):
    import torch

    return model(torch.from_numpy(items.copy()).cuda())


def call_with_cupy(model, items):
    import cupy

    return model(cupy.asarray(items))


def call_elsewhere(model, items):
    import torch

    return model(torch.from_numpy(items.copy()).to("meta"))


def process_bytes():
    """GPU memory that torch holds in the worker's process."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def client():
    with (
        daskshare.local_cluster(dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        yield client


@pytest.fixture(scope="module")
def worker(client):
    return min(client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture
def run(client, worker):
    def run(function, *arguments):
        return client.submit(function, *arguments, workers=[worker], pure=False).result(TIMEOUT)

    return run


@pytest.fixture(scope="module")
def model():
    return daskshare.share(load_net, name="net", max_batch_size=16)


@pytest.fixture(scope="module")
def expected():
    import torch

    with torch.inference_mode():
        return load_net("cpu")(torch.from_numpy(ITEMS)).numpy()


def test_one_worker_a_gpu_with_many_task_threads(client, model):
    from daskshare.device import list_devices

    workers = client.scheduler_info(n_workers=-1)["workers"]
    assert {info["nthreads"] for info in workers.values()} == {16}
    for address in workers:
        client.submit(model, ITEMS, workers=[address], pure=False).result(TIMEOUT)
    devices = [report["device"] for report in daskshare.stats(client).values()]
    assert {device["kind"] for device in devices} == {"cuda"}
    assert {device["uuid"] for device in devices} == {device.uuid for device in list_devices()}


def test_workers_of_gpus_pause_seldom(client):
    def pauses(dask_worker):
        import gc

        return dask_worker.periodic_callbacks["profile"].callback_time, gc.get_freeze_count()

    for interval_milliseconds, frozen in client.run(pauses).values():
        assert interval_milliseconds == 100
        assert frozen > 100_000


def test_host_torch_and_cupy_arrays_give_the_cpus_results(run, model, expected):
    for got in (
        run(model, ITEMS),
        run(model, list(ITEMS)),
        run(call_with_torch, model, ITEMS),
        run(call_with_cupy, model, ITEMS),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)


def test_another_device_is_refused(run, model):
    with pytest.raises(InvalidInputError, match="on meta"):
        run(call_elsewhere, model, ITEMS)


def test_many_tasks_share_one_copy_and_batches(client, worker, model, expected):
    parts = [ITEMS[i : i + 4] for i in range(0, 64, 4)] * 8
    futures = client.map(model, parts, workers=[worker], pure=False)
    results = client.gather(futures)
    for i, result in enumerate(results):
        rows = slice(i % 16 * 4, i % 16 * 4 + 4)
        np.testing.assert_allclose(result, expected[rows], rtol=1e-2, atol=1e-2)
    stats = daskshare.stats(client)[worker]["models"][model.key]
    assert stats["loads"] == 1
    assert stats["model_bytes"] == (6 * 5 + 5 + 5 * 3 + 3) * 4


def test_more_tasks_take_no_more_memory(client, worker):
    def load(device):
        import torch

        return torch.nn.Linear(2048, 2048, bias=False)

    model = daskshare.share(load, name="large", max_batch_size=8)
    items = np.ones((8, 2048), np.float32)
    client.submit(model, items, workers=[worker], pure=False).result(TIMEOUT)
    before = client.run(process_bytes, workers=[worker])[worker]
    client.gather(client.map(model, [items] * 64, workers=[worker], pure=False))
    after = client.run(process_bytes, workers=[worker])[worker]
    # A second copy would be 16 MiB.
    assert after - before < 4 * 2**20


def test_video_is_decoded_by_the_gpu_and_detected(client):
    yolo = daskshare.yolov3("yolov3-tiny", confidence_threshold=0.3)
    chunks = daskshare.read_video(str(traffic_clip()), chunk_seconds=2)
    before = daskshare.stats(client)
    frame = chunks.map_partitions(yolo).to_dataframe()
    found = client.compute(frame).result(TIMEOUT)
    assert dict(found.dtypes) == dict(frame.dtypes)
    assert {"car", "person"} & set(found["class_name"])
    after = daskshare.stats(client)

    def counted(name):
        return sum(after[w]["chunks"][name] - before[w]["chunks"][name] for w in after)

    assert counted("frames") == 250
    assert counted("decoder_nvdec") == counted("chunks") > 0
