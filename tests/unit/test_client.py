"""SharedModel and its makers, without a cluster; tests/cluster has the rest."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import dask
import dask.array as da
import numpy as np
import pytest
from dask.tokenize import tokenize
from dask.utils import funcname

import daskshare.client
from daskshare._engine_activity import Switch
from daskshare.client import SharedModel, install, share, stats
from daskshare.config import VideoOptions
from daskshare.errors import ConfigurationError, InvalidInputError, NotOnWorkerError
from daskshare.models.spec import DETECTION_COLUMNS, Detections, FrameBatch, Prepared
from daskshare.testing import FakeSpec


def load_twice(device):
    return lambda batch: batch * 2


def as_detections(frames):
    return [
        Detections(
            xyxy=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)[: value % 3],
            confidence=np.array([0.75, 0.5], np.float32)[: value % 3],
            class_id=np.array([1, 0], np.int16)[: value % 3],
            class_names=("bus", "car"),
        )
        for value in frames
    ]


class Program:
    def __init__(self, finish):
        self.finish_outputs = finish

    def prepare(self, inputs):
        return Prepared(np.asarray(inputs))

    def finish(self, outputs, context):
        return self.finish_outputs(outputs)


class Engine:
    device = None


class FakeLease:
    def __init__(self, spec, finish, log):
        self.spec = spec
        self.program = Program(finish)
        self.engine = Engine()
        self.log = log

    def submit(self, prepared, *, task=None):
        self.log.append(("submit", task))
        future: Future = Future()
        future.set_result(prepared.items)
        return future

    def decoding(self):
        return Switch(None, "decoding")

    def infer(self, inputs, task=None):
        self.log.append(("infer", task))
        return self.program.finish(self.program.prepare(inputs).items, None)


class FakeShare:
    """Answers with its inputs, passed through ``finish``."""

    def __init__(self, finish=lambda outputs: outputs):
        self.finish = finish
        self.log = []

    @contextmanager
    def lease(self, spec):
        self.log.append(("lease", spec.key))
        yield FakeLease(spec, self.finish, self.log)
        self.log.append(("release", spec.key))


@dataclass
class Clip:
    video: str
    batches: list
    error: str = ""

    @contextmanager
    def open_frames(self, *, device=None, batch_frames=None):
        first = 10

        class Frames:
            problem = ""
            decoder = "pyav"

            def __iter__(inner):
                at = first
                for values in self.batches:
                    times = np.arange(at, at + len(values)) / 10
                    yield FrameBatch(np.array(values), at, times)
                    at += len(values)

        yield Frames()


@pytest.fixture
def local(monkeypatch):
    fake = FakeShare()
    monkeypatch.setattr(daskshare.client, "local_share", lambda: fake)
    monkeypatch.setattr(daskshare.client, "current_task", lambda: "task-7")
    return fake


# -- identity --


def test_equal_keys_are_equal_handles():
    one, same = SharedModel(FakeSpec(factor=3)), SharedModel(FakeSpec(factor=3))
    other = SharedModel(FakeSpec(factor=4))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != one.spec
    assert len({one, same, other}) == 2


def test_pickling_keeps_identity_and_is_small():
    model = share(load_twice, name="twice")
    text = pickle.dumps(model)
    assert len(text) < 2000
    again = pickle.loads(text)  # noqa: S301
    assert again == model
    assert again.spec.loader == model.spec.loader
    assert again.__name__ == "twice"


def test_dask_tokens_follow_the_key():
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        assert tokenize(SharedModel(FakeSpec())) == tokenize(SharedModel(FakeSpec()))
        assert tokenize(SharedModel(FakeSpec())) != tokenize(SharedModel(FakeSpec(factor=9)))


def test_tokens_are_the_same_in_another_process():
    code = (
        "from dask.tokenize import tokenize\n"
        "from daskshare.client import SharedModel\n"
        "from daskshare.testing import FakeSpec\n"
        "print(tokenize(SharedModel(FakeSpec())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenize(SharedModel(FakeSpec()))


def test_what_people_and_schedulers_see():
    model = SharedModel(FakeSpec(name="cars"))
    assert model.__daskshare_model__ is True
    assert (model.name, model.key) == ("cars", model.spec.key)
    assert repr(model) == f"SharedModel('cars', key={model.key[:8]})"
    assert funcname(model) == "cars"


# -- outside a worker --


def test_outside_a_worker_it_says_what_to_do():
    with pytest.raises(NotOnWorkerError, match=r"daskshare\.install\(client\)"):
        SharedModel(FakeSpec())(np.zeros((1, 2)))


def test_under_dasks_other_schedulers_it_says_what_to_do():
    task = dask.delayed(SharedModel(FakeSpec()))(np.zeros((1, 2)))
    with pytest.raises(NotOnWorkerError, match="outside a Dask worker"):
        task.compute(scheduler="threads")


def test_a_dask_collection_is_refused_with_advice():
    with pytest.raises(InvalidInputError, match="map_blocks"):
        SharedModel(FakeSpec())(da.ones((4, 4)))


def test_dask_does_not_get_a_result_for_empty_data(local):
    model = SharedModel(FakeSpec())
    blocks = da.ones((4, 2), chunks=(2, 2)).map_blocks(model, dtype="float32")
    assert blocks.dtype == np.float32
    assert local.log == []


@pytest.mark.parametrize("function", [install, stats])
def test_a_cluster_is_not_a_client(function):
    with pytest.raises(ConfigurationError, match=r"expected a distributed\.Client"):
        function("tcp://scheduler:8786")


# -- dispatch by kind of input --


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (np.ones((2, 3)), np.ones((2, 3))),
        ([np.ones(3), np.ones(3)], np.ones((2, 3))),
        (iter([np.ones(3), np.ones(3)]), np.ones((2, 3))),
        ((np.ones(3) for _ in range(2)), np.ones((2, 3))),
    ],
)
def test_arrays_go_to_infer_with_the_tasks_key(local, inputs, expected):
    spec = FakeSpec()
    np.testing.assert_array_equal(SharedModel(spec)(inputs), expected)
    assert local.log == [("lease", spec.key), ("infer", "task-7"), ("release", spec.key)]


CLIP = Clip("a.mp4", [[1, 2], [0]])


@pytest.mark.parametrize(
    "inputs", [CLIP, [CLIP], (CLIP,), iter([CLIP])], ids=["one", "list", "tuple", "iterator"]
)
def test_video_gives_rows_of_detections(local, inputs):
    local.finish = as_detections
    rows = SharedModel(FakeSpec())(inputs)
    assert all(tuple(row) == DETECTION_COLUMNS for row in rows)
    assert [(r["video"], r["frame"], r["pts_seconds"], r["class_name"]) for r in rows] == [
        ("a.mp4", 10, 1.0, "car"),
        ("a.mp4", 11, 1.1, "car"),
        ("a.mp4", 11, 1.1, "bus"),
    ]
    assert rows[2] == {
        "video": "a.mp4",
        "frame": 11,
        "pts_seconds": 1.1,
        "class_id": 0,
        "class_name": "bus",
        "confidence": 0.5,
        "x_min": 5.0,
        "y_min": 6.0,
        "x_max": 7.0,
        "y_max": 8.0,
    }
    assert [entry[0] for entry in local.log] == ["lease", "submit", "submit", "release"]
    assert ("submit", "task-7") in local.log


def test_several_videos_follow_one_another_and_a_bad_one_is_passed_over(local, caplog):
    local.finish = as_detections
    bad = Clip("bad.mp4", [[1]], error="no video stream")
    rows = SharedModel(FakeSpec())([CLIP, bad, Clip("b.mp4", [[1]])])
    assert [row["video"] for row in rows] == ["a.mp4"] * 3 + ["b.mp4"]
    assert "bad.mp4: no video stream" in caplog.text


@pytest.mark.parametrize("nothing", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_an_empty_partition_gives_no_rows(local, nothing):
    assert SharedModel(FakeSpec())(nothing) == []


def test_other_models_give_a_row_a_frame(local):
    local.finish = lambda frames: {"double": frames * 2, "parts": (frames, frames + 1)}
    rows = SharedModel(FakeSpec())(Clip("a.mp4", [[5, 6]]))
    assert rows == [
        {
            "video": "a.mp4",
            "frame": 10 + i,
            "pts_seconds": (10 + i) / 10,
            "output": {"double": 2 * value, "parts": [value, value + 1]},
        }
        for i, value in enumerate([5, 6])
    ]


def test_video_is_read_as_configured(local):
    sizes = []

    class Recorder(Clip):
        def open_frames(self, *, device=None, batch_frames=None):
            sizes.append(batch_frames)
            return super().open_frames(device=device, batch_frames=batch_frames)

    with dask.config.set({"daskshare.video.frames-per-request": 5}):
        SharedModel(FakeSpec())(Recorder("a.mp4", [[1]]))
    assert sizes == [5]
    assert VideoOptions.from_config().frames_per_request != 5


# -- share() --


def test_share_takes_the_options():
    model = share(
        load_twice, name="twice", max_batch_size=8, batch_sizes=[4, 8], input_dtype="float16"
    )
    spec = model.spec
    assert (spec.max_batch_size, spec.batch_sizes, spec.input_dtype) == (8, (4, 8), "float16")
    assert model.name == "twice"
