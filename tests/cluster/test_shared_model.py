"""Shared models in tasks of a real cluster whose workers are processes."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from distributed import wait

import daskshare
from daskshare.client import SharedModel
from daskshare.errors import ConfigurationError, InferenceError, ModelLoadError
from daskshare.models.spec import DETECTION_COLUMNS, FrameBatch
from daskshare.testing import FakeSpec
from tests.clip import traffic_clip
from tests.cluster.conftest import TASK_THREADS, TIMEOUT

# On a worker, this module's globals belong to the worker's process.
LOADS: list[str] = []
ALL_AT_ONCE = threading.Barrier(TASK_THREADS)


def load_and_count(device):
    from tests.cluster import test_shared_model

    test_shared_model.LOADS.append(str(device))
    return lambda batch: batch * 2


def call_together(model, value):
    from tests.cluster import test_shared_model

    test_shared_model.ALL_AT_ONCE.wait(TIMEOUT)
    return model(np.full((2, 3), value, np.float32))


def count_loads():
    from tests.cluster import test_shared_model

    return len(test_shared_model.LOADS)


def model_stats(client, model):
    """Of each worker that has seen the model."""
    stats = daskshare.stats(client)
    return {w: s["models"][model.key] for w, s in stats.items() if model.key in s["models"]}


@dataclass(frozen=True)
class Clip:
    video: str
    num_frames: int
    error: str = ""

    @contextmanager
    def open_frames(self, *, device=None, batch_frames=None):
        count = self.num_frames

        class Frames:
            problem = ""
            decoder = "pyav"

            def __iter__(self):
                for first in range(0, count, 4):
                    n = min(4, count - first)
                    frames = np.arange(first, first + n, dtype=np.uint8).reshape(n, 1, 1, 1)
                    times = np.arange(first, first + n) / 25
                    yield FrameBatch(np.broadcast_to(frames, (n, 2, 2, 3)), first, times)

        yield Frames()


def first_pixel(device):
    return lambda batch: batch[:, 0, 0, 0]


def test_each_worker_loads_once_however_many_tasks_race(client):
    model = daskshare.share(load_and_count, name="racers")
    workers = list(client.scheduler_info()["workers"])
    futures = [
        client.submit(call_together, model, i, workers=[worker], key=f"race-{worker}-{i}")
        for worker in workers
        for i in range(TASK_THREADS)
    ]
    results = client.gather(futures)
    assert [r[0, 0] for r in results] == [2.0 * i for _ in workers for i in range(TASK_THREADS)]
    assert client.run(count_loads) == dict.fromkeys(workers, 1)
    stats = model_stats(client, model)
    assert {w: (s["name"], s["loads"]) for w, s in stats.items()} == dict.fromkeys(
        workers, ("racers", 1)
    )


def test_stats_are_of_this_moment(client):
    model = SharedModel(FakeSpec(name="moment"))
    [worker, *_] = client.scheduler_info()["workers"]
    for frames in (3, 8):
        client.submit(model, np.ones((frames if frames == 3 else 5, 2)), workers=[worker]).result()
        [stats] = model_stats(client, model).values()
        assert (stats["frames"], stats["loads"]) == (frames, 1)
        assert stats["mean_batch_size"] == stats["frames"] / stats["batches"]
        assert stats["model_bytes"] == 1000
    report = daskshare.stats(client)[worker]
    assert report["state"] == "ready"
    assert report["device"]["kind"] == "cpu"
    assert report["frames"] == sum(m["frames"] for m in report["models"].values())


def test_a_misspelt_option_is_told_at_install(client):
    with (
        dask.config.set({"daskshare.engine.max-wiat": "1ms"}),
        pytest.raises(ConfigurationError, match=r"Did you mean daskshare\.engine\.max-wait"),
    ):
        daskshare.install(client)


def test_submit_and_map(client):
    model = SharedModel(FakeSpec(name="submitted"))
    future = client.submit(model, np.ones((2, 2)))
    assert future.key.startswith("submitted-")
    np.testing.assert_array_equal(future.result(), np.full((2, 2), 2.0))
    results = client.gather(client.map(model, [np.full((1, 2), i) for i in range(20)]))
    assert [r[0, 0] for r in results] == [2.0 * i for i in range(20)]


def test_delayed(client):
    model = SharedModel(FakeSpec(name="delayed"))
    parts = [dask.delayed(model)(np.full((1, 2), i)) for i in range(4)]
    assert dask.delayed(sum)([part[0, 0] for part in parts]).compute() == 2.0 * (0 + 1 + 2 + 3)


def test_bag_with_default_optimisation(client):
    model = SharedModel(FakeSpec(name="bagged", factor=3))
    bag = db.from_sequence(range(10), npartitions=4).map(lambda i: np.full(2, i, np.float32))
    assert [v[0] for v in bag.map_partitions(model).compute()] == [3.0 * i for i in range(10)]
    one_by_one = bag.map(lambda v: v[None]).map(model).map(lambda v: float(v[0, 0]))
    assert one_by_one.sum().compute() == 3.0 * sum(range(10))


def test_array_map_blocks(client):
    model = SharedModel(FakeSpec(name="blocks"))
    array = da.arange(24, chunks=6, dtype=np.float32).reshape(12, 2)
    doubled = array.map_blocks(model, dtype=np.float32)
    np.testing.assert_array_equal(
        doubled.compute(), 2 * np.arange(24, dtype=np.float32).reshape(12, 2)
    )


def test_results_feed_other_tasks_and_models(client):
    double, triple = SharedModel(FakeSpec("d", factor=2)), SharedModel(FakeSpec("t", factor=3))
    data = client.submit(np.ones, (4, 2))
    assert client.submit(np.sum, client.submit(triple, client.submit(double, data))).result() == 48


def test_a_partition_of_video_gives_rows(client):
    model = daskshare.share(first_pixel, name="pixels")
    clips = [Clip("a.mp4", 6), Clip("bad.mp4", 0, error="no video stream"), Clip("b.mp4", 5)]
    before = daskshare.stats(client)
    rows = db.from_sequence(clips, npartitions=3).map_partitions(model).compute()
    assert [(r["video"], r["frame"], r["output"]) for r in rows] == [
        (video, i, i) for video, n in (("a.mp4", 6), ("b.mp4", 5)) for i in range(n)
    ]
    after = daskshare.stats(client)

    def counted(name):
        return sum(after[w]["chunks"][name] - before[w]["chunks"][name] for w in after)

    assert (counted("chunks"), counted("frames"), counted("chunks_failed")) == (3, 11, 1)
    assert counted("decoder_pyav") == 2


def test_a_failed_load_is_an_error_at_each_task_and_other_models_load(client):
    model = SharedModel(FakeSpec(name="absent", load_error="weights.bin does not exist"))
    for _ in range(2):
        future = client.submit(model, np.ones((1, 2)), pure=False)
        with pytest.raises(ModelLoadError, match=r"weights\.bin does not exist") as caught:
            future.result(timeout=TIMEOUT)
        assert caught.value.model == "absent"
        assert "RuntimeError" in caught.value.reason
    assert client.submit(SharedModel(FakeSpec(name="present")), np.ones((1, 2))).result()[0, 0] == 2


def test_a_bad_frame_fails_its_own_task_only(client):
    model = SharedModel(FakeSpec(name="picky", poison=-1))
    values = [0, 1, -1, 2, 3, 4, 5, 6]
    futures = client.map(model, [np.full((1, 2), v) for v in values])
    wait(futures, timeout=TIMEOUT)
    assert [f.status for f in futures] == ["error" if v == -1 else "finished" for v in values]
    assert isinstance(futures[2].exception(), InferenceError)


def test_threads_that_a_task_starts_may_call_too(client):
    model = SharedModel(FakeSpec(name="threads"))

    def task(model):
        results = []
        thread = threading.Thread(target=lambda: results.append(model(np.ones((1, 2)))))
        thread.start()
        thread.join(TIMEOUT)
        return results[0][0, 0]

    assert client.submit(task, model).result(timeout=TIMEOUT) == 2


def test_a_model_of_torch_modules(client):
    def load(device):
        import torch

        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(dim=1))

    model = daskshare.share(load, name="linear", max_batch_size=8)
    out = client.submit(model, np.ones((20, 4), np.float32)).result(timeout=TIMEOUT)
    assert out.shape == (20, 3)
    np.testing.assert_allclose(out.sum(axis=1), 1, rtol=1e-5)
    assert [s["model_bytes"] for s in model_stats(client, model).values()] == [(4 * 3 + 3) * 4]


def test_real_traffic_becomes_a_dataframe(client):
    yolo = daskshare.yolov3("yolov3-tiny", classes=["car", "person", "bus", "truck"])
    chunks = daskshare.read_video(str(traffic_clip()), chunk_seconds=1)
    frame = chunks.map_partitions(yolo).to_dataframe()
    assert tuple(frame.columns) == DETECTION_COLUMNS
    found = frame.get_partition(0).compute()
    assert dict(found.dtypes) == dict(frame.dtypes)
    assert set(found["class_name"]) <= {"car", "person", "bus", "truck"}
    assert len(found) > 0
    assert found["frame"].is_monotonic_increasing
    # The table of the same partition made by hand.
    rows = client.submit(yolo, chunks.to_delayed()[0].compute()).result(timeout=TIMEOUT)
    assert [row["confidence"] for row in rows] == pytest.approx(
        found["confidence"].tolist(), abs=1e-3
    )
