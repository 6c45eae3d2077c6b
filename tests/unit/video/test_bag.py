from __future__ import annotations

import subprocess
import sys

import dask.bag
import pandas as pd
import pytest

from daskshare.models.spec import DETECTION_COLUMNS
from daskshare.video.bag import DETECTION_DTYPES, DetectionBag, VideoBag, read_video
from daskshare.video.chunk import VideoChunk


class StandInModel:
    """As a shared model: marked, picklable, called with a partition of chunks."""

    __daskshare_model__ = True

    def __init__(self, rows_per_chunk=2):
        self.rows_per_chunk = rows_per_chunk

    def __call__(self, chunks):
        (chunk,) = chunks
        values = (chunk.video, chunk.first_frame, 0.5, 2, "car", 0.75, 1.0, 2.0, 3.0, 4.0)
        return [dict(zip(DETECTION_COLUMNS, values, strict=True))] * self.rows_per_chunk


class MustNotRun(StandInModel):
    def __call__(self, chunks):
        raise AssertionError("the model ran")


@pytest.fixture
def bag(clips, tmp_path):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0"}
    clips.write(tmp_path / "a.mp4", frames=30, options=options)
    clips.write(tmp_path / "b.mp4", frames=10, options=options)
    return read_video(tmp_path, chunk_seconds=0.4)


def test_one_chunk_a_partition(bag):
    assert isinstance(bag, VideoBag)
    assert isinstance(bag, dask.bag.Bag)
    assert bag.npartitions == 4
    partitions = [p.compute(scheduler="sync") for p in bag.to_delayed()]
    assert [len(p) for p in partitions] == [1, 1, 1, 1]
    assert all(isinstance(p[0], VideoChunk) for p in partitions)
    assert [p[0].first_frame for p in partitions] == [0, 10, 20, 0]


def test_dataframe_is_known_without_running_anything(bag):
    detections = bag.map_partitions(MustNotRun())
    assert isinstance(detections, DetectionBag)
    frame = detections.to_dataframe()
    assert tuple(frame.columns) == DETECTION_COLUMNS
    expected = pd.DataFrame({c: pd.Series(dtype=t) for c, t in DETECTION_DTYPES.items()}).dtypes
    for column in DETECTION_COLUMNS[1:4]:
        assert frame.dtypes[column] == expected[column]
    for column in DETECTION_COLUMNS[5:]:
        assert frame.dtypes[column] == "float32"
    for column in ("video", "class_name"):
        assert pd.api.types.is_string_dtype(frame.dtypes[column])


@pytest.mark.parametrize("rows_per_chunk", [0, 2])
def test_computed_dataframe_has_the_announced_types(bag, rows_per_chunk):
    lazy = bag.map_partitions(StandInModel(rows_per_chunk)).to_dataframe()
    frame = lazy.compute(scheduler="sync")
    assert len(frame) == 4 * rows_per_chunk
    assert frame.dtypes.to_dict() == lazy.dtypes.to_dict()


def test_other_functions_give_ordinary_bags(bag):
    counts = bag.map_partitions(lambda chunks: [c.num_frames for c in chunks])
    assert type(counts) is dask.bag.Bag
    assert counts.compute(scheduler="sync") == [10, 10, 10, 10]
    rows = bag.map_partitions(StandInModel()).map_partitions(lambda rows: [len(rows)])
    assert type(rows) is dask.bag.Bag
    assert rows.compute(scheduler="sync") == [2, 2, 2, 2]


def test_same_videos_give_the_same_keys(bag, tmp_path):
    again = read_video(tmp_path, chunk_seconds=0.4)
    assert again.name == bag.name
    assert read_video(tmp_path, chunk_seconds=10).name != bag.name


def test_importing_loads_none_of_the_heavy_packages():
    code = (
        "import sys, daskshare.video.bag, daskshare.video.chunk; "
        "print(sorted({'torch', 'cv2', 'av', 'cupy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
