"""Spark's own reader of videos and images, and tables from Spark to Dask and back."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("pyspark")

import dask.dataframe as dd

from daskshare.errors import ConfigurationError
from daskshare.models.spec import DETECTION_COLUMNS
from daskshare.spark import detect, register, to_dask, to_spark
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet
from tests.spark.conftest import needs_data_sources, spark_release
from tests.unit.video.conftest import write_clip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small network, a clip, some images and what is neither, in one folder."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "small.cfg").write_text(SMALL_CFG)
    write_darknet(folder / "small.weights", random_floats(small_plan()))
    (folder / "small.names").write_text("left\nright\n")
    (folder / "media").mkdir()
    write_clip(folder / "media" / "clip.mp4", frames=20)
    for i in range(5):
        frame = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / "media" / f"{i}.png"), frame)
    (folder / "media" / "notes.txt").write_text("neither")
    return folder


def source(spark, files, **options):
    register(spark)
    given = {
        "cfg": files / "small.cfg",
        "weights": files / "small.weights",
        "names": files / "small.names",
        "confidence": 0.3,
        "numPartitions": 2,
        **options,
    }
    reader = spark.read.format("daskshare")
    for name, value in given.items():
        reader = reader.option(name, str(value))
    return reader


@pytest.mark.short
@needs_data_sources
def test_a_folder_of_videos_and_images(spark, files):
    found = source(spark, files).load(str(files / "media"))
    assert found.columns == list(DETECTION_COLUMNS)
    frames = {(row.video, row.frame) for row in found.select("video", "frame").distinct().collect()}
    expected = {(str(files / "media" / f"{i}.png"), 0) for i in range(5)}
    assert frames == expected | {(str(files / "media" / "clip.mp4"), i) for i in range(20)}


@needs_data_sources
def test_files_that_cannot_be_read_give_their_reason(spark, files, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    (tmp_path / "bad.mp4").write_text("no video")
    rows = source(spark, files, errorColumn="why").load(str(tmp_path)).collect()
    assert {row.video for row in rows} == {str(tmp_path / "bad.jpg"), str(tmp_path / "bad.mp4")}
    assert all(row.why and row.class_id is None for row in rows)


@pytest.mark.short
@needs_data_sources
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"numPartitions": "many"}, "numpartitions='many'"),
        ({"modle": "yolov3"}, r"options \['modle'\]"),
        ({"weights": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_options_are_refused(spark, files, options, reason):
    with pytest.raises(Exception, match=reason):
        source(spark, files, **options).load(str(files / "media")).count()


@pytest.mark.short
@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_a_table_of_dask_in_spark_and_back(spark, tmp_path):
    pdf = pd.DataFrame({"frame": range(100), "class_name": ["car", "bus"] * 50})
    there = to_spark(spark, dd.from_pandas(pdf, npartitions=3), path=tmp_path)
    assert there.where("class_name = 'car'").count() == 50
    back = to_dask(there, path=tmp_path).compute().sort_values("frame")
    assert back["frame"].tolist() == list(range(100))


@pytest.mark.short
def test_what_detect_wrote_is_read_where_it_is(spark, tmp_path):
    (tmp_path / "detections").mkdir()
    pd.DataFrame({"video": ["a"], "frame": [3]}).to_parquet(tmp_path / "detections" / "0.parquet")
    assert to_spark(spark, tmp_path).first().frame == 3


@pytest.mark.short
@pytest.mark.skipif(spark_release() >= (4, 0), reason="pyspark 4.0 and newer has data sources")
def test_a_spark_without_data_sources_is_told_what_to_use(spark):
    with pytest.raises(ConfigurationError, match=r"expected pyspark 4\.0 or newer"):
        register(spark)


def test_what_is_no_table_is_refused(spark):
    with pytest.raises(ConfigurationError, match="Got int"):
        to_spark(spark, 7)
    with pytest.raises(ConfigurationError, match="no path"):
        to_spark(spark, dd.from_pandas(pd.DataFrame({"a": [1]}), npartitions=1))


@needs_data_sources
def test_detect_agrees_with_the_source(spark, files):
    from daskshare.client import yolov3

    yolo = yolov3(
        cfg=files / "small.cfg",
        weights=files / "small.weights",
        names=files / "small.names",
        confidence_threshold=0.3,
    )
    images = spark.read.format("binaryFile").load(f"{files}/media/*.png")
    by_detect = detect(images, yolo, input_col="content", key_cols=["path"]).count()
    assert source(spark, files).load(f"{files}/media/*.png").count() == by_detect
