"""What a task of detect does, with Arrow batches as Spark hands them over and a host beside it."""

from __future__ import annotations

import contextlib
import functools
import pickle

import cv2
import numpy as np
import pyarrow as pa
import pytest

from daskshare._host_link import SocketLink
from daskshare._host_start import connect
from daskshare.client import yolov3
from daskshare.config import EngineOptions, HostOptions, ShareOptions, VideoOptions
from daskshare.device import Device
from daskshare.errors import (
    ConfigurationError,
    InvalidInputError,
    TruncatedVideoError,
    UnreadableVideoError,
)
from daskshare.host import HostAddress, HostClient, HostServer
from daskshare.models.spec import Detections
from daskshare.results.schema import detections_batch
from daskshare.share import ModelShare
from daskshare.spark import partition
from daskshare.spark.columns import INPUT, Columns
from daskshare.streaming import stream
from daskshare.testing import FakeSpec
from daskshare.video.probe import probe_videos
from tests.clip import traffic_clip
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A small network with random weights; finds many things in anything."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "small.cfg").write_text(SMALL_CFG)
    weights = write_darknet(folder / "small.weights", random_floats(small_plan()))
    return yolov3(
        cfg=folder / "small.cfg",
        weights=weights,
        names=["left", "right"],
        confidence_threshold=0.3,
    ).spec


@pytest.fixture
def share():
    share = ModelShare(Device.cpu(), options=ShareOptions(), engine_options=EngineOptions())
    yield share
    share.close()


@pytest.fixture
def host(share, tmp_path, monkeypatch):
    """Lets Partition find a host in this process."""
    address = HostAddress("cpu", str(tmp_path))
    server = HostServer(address, lambda: share, options=HostOptions(), owner="worker")

    def client(device, *, allow_code):
        link = functools.partial(connect, address)
        return HostClient(connect=lambda: SocketLink(link()), allow_code=allow_code)

    monkeypatch.setattr(partition, "HostClient", client)
    monkeypatch.setattr(partition, "task_device", lambda: "cpu")
    yield server
    server.close()


def run(spec, batches, *, kind, keys=("id",), error=None, shape=None, **options):
    work = partition.Partition(
        spec,
        Columns(kind=kind, keys=keys, error=error),
        **{
            "input_shape": shape,
            "chunk_seconds": None,
            "rows_per_request": 2,
            "requests_in_flight": 3,
            "allow_code": False,
            **options,
        },
    )
    # As Spark does: pickled in the driver, called once in each task.
    work = pickle.loads(pickle.dumps(work))  # noqa: S301
    return list(work(iter(batches)))


def rows(batches):
    return [row for batch in batches for row in batch.to_pylist()]


def found(share, spec, frames):
    """What the model finds in single frames, by their index, without any host."""
    with share.lease(spec) as lease:
        return [lease.infer([frame])[0] for frame in frames]


def boxes(detections):
    return [
        (int(c), pytest.approx(float(p), abs=1e-5), *(pytest.approx(float(v), abs=1e-2) for v in b))
        for c, p, b in zip(detections.class_id, detections.confidence, detections.xyxy, strict=True)
    ]


def boxes_of(found_rows):
    names = ("class_id", "confidence", "x_min", "y_min", "x_max", "y_max")
    return [tuple(row[name] for name in names) for row in found_rows]


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (48 + 16 * (i % 2), 64 + 8 * i, 3), dtype=np.uint8)
        for i in range(count)
    ]


def encoded(frame, suffix):
    ok, data = cv2.imencode(suffix, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    assert ok
    return data.tobytes()


def decoded(data):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)


def batch_of(values, ids=None, kind=None):
    ids = range(len(values)) if ids is None else ids
    return pa.record_batch({"id": pa.array(ids, pa.int64()), INPUT: pa.array(values, kind)})


def test_images_of_several_kinds_and_sizes(host, share, spec):
    files = [encoded(frame, [".jpg", ".png"][i % 2]) for i, frame in enumerate(pictures(5))]
    got = run(spec, [batch_of(files[:3]), batch_of(files[3:], [3, 4])], kind="images")
    assert all(batch.schema.names[0] == "id" for batch in got)
    expected = found(share, spec, [decoded(file) for file in files])
    assert sum(map(len, expected)) > 5
    for i, detections in enumerate(expected):
        mine = [row for row in rows(got) if row["id"] == i]
        assert boxes_of(mine) == boxes(detections)
        assert [row["class_name"] for row in mine] == detections.names()
        assert {(row["video"], row["frame"], row["pts_seconds"]) for row in mine} <= {(None, 0, 0)}
    assert [row["id"] for row in rows(got)] == sorted(row["id"] for row in rows(got))


def test_a_sliced_column_is_read_from_its_place(host, share, spec):
    files = [encoded(frame, ".png") for frame in pictures(4)]
    got = run(spec, [batch_of(files).slice(1, 2)], kind="images")
    assert {row["id"] for row in rows(got)} == {1, 2}
    assert boxes_of([row for row in rows(got) if row["id"] == 2]) == boxes(
        found(share, spec, [decoded(files[2])])[0]
    )


BAD_IMAGES = [b"no image", b"", None]


def test_a_bad_image_gives_its_reason_and_the_others_their_rows(host, share, spec):
    good = encoded(pictures(1)[0], ".png")
    values = [good, *BAD_IMAGES, good]
    got = rows(run(spec, [batch_of(values, kind=pa.binary())], kind="images", error="why"))
    failed = [row for row in got if row["why"] is not None]
    assert [row["id"] for row in failed] == [1, 2, 3]
    assert "8 bytes" in failed[0]["why"]
    assert all(row["class_id"] is None and row["frame"] is None for row in failed)
    expected = boxes(found(share, spec, [decoded(good)])[0])
    for i in (0, 4):
        assert boxes_of([row for row in got if row["id"] == i]) == expected


@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_a_bad_image_fails_the_task_and_is_named(host, spec, bad):
    with pytest.raises(InvalidInputError, match=r"\{'id': 7\}.*error_col"):
        run(spec, [batch_of([bad], [7], kind=pa.binary())], kind="images")


def frames_as(kind, frames):
    if kind == "binary":
        return pa.array([frame.tobytes() for frame in frames])
    flat = [frame.reshape(-1) for frame in frames]
    if kind == "tinyint":
        return pa.array([f.view(np.int8) for f in flat], pa.list_(pa.int8()))
    return pa.array([f.astype(np.int16) for f in flat], pa.list_(pa.int16()))


@pytest.mark.parametrize("kind", ["binary", "tinyint", "smallint"])
def test_raw_frames(host, share, spec, kind):
    frames = list(np.random.default_rng(1).integers(0, 256, (5, 30, 40, 3), dtype=np.uint8))
    column = frames_as(kind, frames)
    batch = pa.record_batch({"id": pa.array(range(5)), INPUT: column})
    got = rows(run(spec, [batch.slice(0, 3), batch.slice(3)], kind="frames", shape=(30, 40, 3)))
    for i, detections in enumerate(found(share, spec, frames)):
        assert boxes_of([row for row in got if row["id"] == i]) == boxes(detections)


def test_a_frame_of_a_wrong_size_does_not_shift_the_others(host, share, spec):
    frames = list(np.random.default_rng(1).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8))
    values = [frames[0].tobytes(), frames[1].tobytes()[:-1], frames[2].tobytes()]
    got = rows(
        run(
            spec,
            [batch_of(values)],
            kind="frames",
            shape=(30, 40, 3),
            error="why",
            rows_per_request=8,
        )
    )
    assert [(row["id"], row["why"]) for row in got if row["why"]] == [
        (1, "3599 bytes; expected 3600 for a frame of shape (30, 40, 3)")
    ]
    for i in (0, 2):
        mine = [row for row in got if row["id"] == i]
        assert boxes_of(mine) == boxes(found(share, spec, [frames[i]])[0])
    with pytest.raises(InvalidInputError, match="'id': 1"):
        run(spec, [batch_of(values)], kind="frames", shape=(30, 40, 3))


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory):
    """Some seconds of the traffic clip, and the same cut short."""
    path = tmp_path_factory.mktemp("clip") / "traffic.mp4"
    path.write_bytes(traffic_clip().read_bytes())
    return path


def test_videos_give_the_rows_that_a_chunk_by_chunk_run_gives(host, share, spec, short_clip):
    given = pa.record_batch(
        {"camera": ["north", "south"], INPUT: [str(short_clip), short_clip.as_uri()]}
    )
    got = run(spec, [given], kind="videos", keys=("camera",), chunk_seconds=2.0)
    table = pa.Table.from_batches(got)
    expected = []
    with share.lease(spec) as lease:
        for chunk in probe_videos(str(short_clip), chunk_seconds=2.0):
            with stream(lease, chunk, options=VideoOptions()) as batches:
                expected += [
                    detections_batch("", frames.first_frame, frames.pts_seconds, results)
                    for frames, results in batches
                ]
    expected_table = pa.Table.from_batches(expected)
    for camera, video in (("north", str(short_clip)), ("south", short_clip.as_uri())):
        mine = table.filter(pa.compute.equal(table["camera"], camera))
        assert set(mine["video"].to_pylist()) == {video}
        for name in ("frame", "pts_seconds", "class_id"):
            assert mine[name].to_pylist() == expected_table[name].to_pylist()
        # Sums in batches of another size round otherwise.
        for name in ("confidence", "x_min", "y_max"):
            np.testing.assert_allclose(mine[name], expected_table[name], rtol=1e-4, atol=1e-2)
    assert len(table) == 2 * len(expected_table) > 0


def test_a_video_that_cannot_be_read(host, spec, tmp_path):
    (tmp_path / "note.mp4").write_text("no video")
    paths = [str(tmp_path / "gone.mp4"), str(tmp_path / "note.mp4"), None]
    got = rows(run(spec, [batch_of(paths, kind=pa.string())], kind="videos", error="why"))
    assert [(row["id"], row["video"]) for row in got] == list(enumerate(paths))
    assert "gone.mp4" in got[0]["why"]
    assert got[2]["why"] == "the path is null"
    for path in paths[:2]:
        with pytest.raises(UnreadableVideoError, match="error_col") as caught:
            run(spec, [batch_of([path])], kind="videos")
        assert caught.value.video == path


def test_a_truncated_video_gives_what_it_has_and_says_so(host, spec, short_clip, tmp_path):
    from tests.unit.video.conftest import write_clip

    whole = tmp_path / "whole.mkv"
    write_clip(whole)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    got = rows(run(spec, [batch_of([str(cut)])], kind="videos", error="why"))
    assert len([row for row in got if row["why"] is None]) > 0
    assert len([row for row in got if row["why"]]) == 1
    with pytest.raises(TruncatedVideoError):
        run(spec, [batch_of([str(cut)])], kind="videos")


def test_an_empty_partition_asks_nobody(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("connected")

    monkeypatch.setattr(partition, "HostClient", refuse)
    assert run("yolov3-tiny", [], kind="images") == []


def test_a_model_of_ones_own_needs_permission(host):
    with pytest.raises(ConfigurationError, match="allow_code=True"):
        run(FakeSpec(), [batch_of([b"x"])], kind="images")


def test_a_model_that_is_no_detector_is_refused(host):
    frame = np.zeros((30, 40, 3), np.uint8)
    with pytest.raises(ConfigurationError, match="one Detections a frame"):
        run(
            FakeSpec(),
            [batch_of([frame.tobytes()])],
            kind="frames",
            shape=(30, 40, 3),
            allow_code=True,
        )


def test_no_more_requests_wait_than_asked_for(host, spec, monkeypatch):
    most = []
    submit = HostClient.submit

    def counted(self, *args, **kwargs):
        number = submit(self, *args, **kwargs)
        most.append(self.num_pending)
        return number

    monkeypatch.setattr(HostClient, "submit", counted)
    files = [encoded(frame, ".png") for frame in pictures(9)]
    read = []

    def batches():
        for i, file in enumerate(files):
            read.append(i)
            yield batch_of([file], [i])

    work = partition.Partition(
        spec,
        Columns(kind="images", keys=("id",), error=None),
        input_shape=None,
        chunk_seconds=None,
        rows_per_request=4,
        requests_in_flight=2,
        allow_code=False,
    )
    with contextlib.closing(work(batches())) as output:
        next(output)
        assert len(read) <= 3
    assert max(most) <= 2


def test_ending_a_task_early_ends_its_connection(host, spec):
    files = [encoded(frame, ".png") for frame in pictures(4)]
    work = partition.Partition(
        spec,
        Columns(kind="images", keys=("id",), error=None),
        input_shape=None,
        chunk_seconds=None,
        rows_per_request=1,
        requests_in_flight=2,
        allow_code=False,
    )
    output = work(iter([batch_of(files)]))
    next(output)
    assert host.report()["connections"] == 1
    output.close()
    host.retire()
    host.wait_unused()


def test_keys_that_say_where_take_the_place_of_ours():
    columns = Columns(kind="frames", keys=("frame", "video"), error=None)
    assert "frame" not in columns.detections
    assert columns.detections[0] == "pts_seconds"


class Counting:
    """A client whose answers come only when they are asked for."""

    def __init__(self):
        self.submitted = self.answered = 0
        self.most = 0

    def open(self, spec):
        return spec

    def submit(self, op, arguments=None, *, value=None, model=None):
        self.submitted += 1
        self.most = max(self.most, self.submitted - self.answered)
        return self.submitted

    def result(self, request):
        # In the order of the requests, and one after the other.
        self.answered += 1
        assert request == self.answered
        one = Detections(np.zeros((1, 4)), np.ones(1), np.zeros(1, int), ("thing",))
        return detections_batch("", 0, np.zeros(1), [one])

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass


@pytest.mark.parametrize("window", [1, 3, 8])
def test_as_many_requests_wait_as_asked_for_and_no_more_rows_are_read(monkeypatch, window):
    client = Counting()
    monkeypatch.setattr(partition, "HostClient", lambda device, *, allow_code: client)
    monkeypatch.setattr(partition, "task_device", lambda: "cpu")
    read = []

    def batches():
        for i in range(20):
            read.append(i)
            # One more has come in than requests wait, and no answer was asked for in vain.
            assert client.submitted == i
            assert client.submitted - client.answered == min(i, window - 1)
            yield batch_of([bytes(12)] * 2, [2 * i, 2 * i + 1])

    work = partition.Partition(
        "any",
        Columns(kind="frames", keys=("id",), error=None),
        input_shape=(2, 2, 3),
        chunk_seconds=None,
        rows_per_request=2,
        requests_in_flight=window,
        allow_code=False,
    )
    out = work(batches())
    assert read == []
    first = next(out)
    # Nothing is read ahead of what Spark takes away.
    assert read == list(range(window))
    assert first.column("id").to_pylist() == [0]
    got = [first, *out]
    assert [row["id"] for row in rows(got)] == [2 * i for i in range(20)]
    assert client.most == window
