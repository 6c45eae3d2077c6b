"""detect in Spark: videos, images and frames, in batches and streams, with hosts that die."""

from __future__ import annotations

import os
import signal

import cv2
import numpy as np
import pytest

pytest.importorskip("pyspark")

import pyspark.sql.functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    ByteType,
    DoubleType,
    LongType,
    StringType,
    StructType,
)

import daskshare
from daskshare.errors import ConfigurationError
from daskshare.models.spec import DETECTION_COLUMNS
from daskshare.spark import detect
from daskshare.testing import FakeSpec
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet
from tests.unit.video.conftest import write_clip

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def yolo(tmp_path_factory):
    """A small network with random weights; finds many things in anything."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "small.cfg").write_text(SMALL_CFG)
    return daskshare.yolov3(
        cfg=folder / "small.cfg",
        weights=write_darknet(folder / "small.weights", random_floats(small_plan())),
        names=["left", "right"],
        confidence_threshold=0.3,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        frame = rng.integers(0, 256, (48, 64 + 8 * (i % 3), 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{i:02}{['.jpg', '.png'][i % 2]}"), frame)
    return folder


@pytest.mark.short
def test_images_of_a_folder_with_one_load_for_all_tasks(spark, host, yolo, photos):
    images = spark.read.format("binaryFile").load(str(photos)).repartition(6)
    found = detect(images, yolo, input_col="content", key_cols=["path", "length"])
    assert found.columns == ["path", "length", *DETECTION_COLUMNS]
    rows = found.collect()
    assert len({row.path for row in rows}) == NUM_IMAGES
    assert {row.frame for row in rows} == {0}
    assert {row.class_name for row in rows} <= {"left", "right"}
    model = host.report()["models"][yolo.key]
    assert model["loads"] == 1
    assert model["frames"] == NUM_IMAGES
    # Again, in other partitions: the same rows, and no second load.
    again = detect(images.coalesce(1), yolo, input_col="content", key_cols=["path"]).count()
    assert again == len(rows)
    assert host.report()["models"][yolo.key]["loads"] == 1


@pytest.mark.short
def test_videos_keep_their_key_columns_and_a_bad_one_its_reason(spark, yolo, tmp_path):
    clips = [write_clip(tmp_path / f"{i}.mp4", frames=20 + i) for i in range(3)]
    cameras = spark.createDataFrame(
        [(f"cam{i}", path) for i, path in enumerate([*clips, str(tmp_path / "gone.mp4")])],
        schema="camera string, video string",
    ).repartition(4)
    found = detect(cameras, yolo, input_col="video", error_col="why").cache()
    per_camera = {
        row.camera: (row.last, row.videos)
        for row in found.where("why is null")
        .groupBy("camera")
        .agg(F.max("frame").alias("last"), F.collect_set("video").alias("videos"))
        .collect()
    }
    assert per_camera == {f"cam{i}": (19 + i, [clips[i]]) for i in range(3)}
    [bad] = found.where("why is not null").collect()
    assert bad.camera == "cam3"
    assert "gone.mp4" in bad.why
    assert bad.class_id is None
    with pytest.raises(Exception, match=r"gone\.mp4.*error_col"):
        detect(cameras, yolo, input_col="video").count()


@pytest.mark.short
def test_raw_frames(spark, yolo):
    frames = np.random.default_rng(0).integers(0, 256, (10, 48, 64, 3), dtype=np.uint8)
    df = spark.createDataFrame(
        [(i, bytearray(frame.tobytes())) for i, frame in enumerate(frames)],
        schema="frame bigint, pixels binary",
    )
    found = detect(df, yolo, input_col="pixels", input_shape=(48, 64, 3))
    assert found.columns.count("frame") == 1
    assert {row.frame for row in found.select("frame").distinct().collect()} == set(range(10))


@pytest.mark.short
@pytest.mark.parametrize("way", ["foreachBatch", "file sink"])
def test_a_stream_gives_each_image_once(spark, yolo, photos, tmp_path, way):
    images = (
        spark.readStream.format("binaryFile")
        .schema("path string, modificationTime timestamp, length bigint, content binary")
        .option("maxFilesPerTrigger", 12)
        .load(str(photos))
    )
    out = str(tmp_path / "out")

    def find(df):
        return detect(df, yolo, input_col="content", key_cols=["path"])

    if way == "foreachBatch":

        def write(df, batch):
            find(df).write.mode("overwrite").parquet(f"{out}/batch={batch}")

        writer = images.writeStream.foreachBatch(write)
    else:
        writer = find(images).writeStream.format("parquet").option("path", out)
    query = (
        writer.option("checkpointLocation", str(tmp_path / "checkpoint"))
        .trigger(availableNow=True)
        .start()
    )
    assert query.awaitTermination(60)
    streamed = spark.read.parquet(out).groupBy("path").count()
    at_once = find(spark.read.format("binaryFile").load(str(photos))).groupBy("path").count()
    assert sorted(streamed.collect()) == sorted(at_once.collect())


@pytest.mark.short
def test_a_host_killed_in_the_middle_of_a_job_changes_nothing(spark, host, yolo, photos):
    images = spark.read.format("binaryFile").load(str(photos)).repartition(4).cache()
    expected = detect(images, yolo, input_col="content", key_cols=["path"]).count()

    # Killed by a task of the same job, after its first rows have come and while others run.
    flag = f"{host.address.directory}/killed"
    pid_file = f"{host.address.directory}/cpu.pid"
    with open(pid_file, "w") as file:
        file.write(str(host.host["pid"]))

    def kill(batches):
        for batch in batches:
            try:
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                yield batch
                continue
            with open(pid_file) as file:
                os.kill(int(file.read()), signal.SIGKILL)
            yield batch

    found = detect(images, yolo, input_col="content", key_cols=["path"], rows_per_request=2)
    killed = found.select("path", "class_id", "confidence").mapInArrow(
        kill, "path string, class_id smallint, confidence float"
    )
    assert killed.count() == expected
    assert os.path.exists(flag)
    os.unlink(flag)


SCHEMA = (
    StructType()
    .add("id", LongType())
    .add("path", StringType())
    .add("content", BinaryType())
    .add("array", ArrayType(ByteType()))
    .add("score", DoubleType())
    .add("confidence", DoubleType())
)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"input_col": "nothing"}, r"expected one of the columns \['id'"),
        ({"input_col": "score"}, "of type double"),
        ({"input_col": "array"}, r"expected input_shape="),
        ({"input_col": "path", "input_shape": (4, 4, 3)}, "of type string and input_shape"),
        ({"input_col": "content", "input_shape": (4, 4)}, r"expected \(height, width, 3\)"),
        ({"input_col": "content", "key_cols": ["nobody"]}, "key column 'nobody'"),
        ({"input_col": "content"}, r"\['confidence'\] would come out twice"),
        ({"input_col": "content", "key_cols": ["id"], "error_col": "id"}, r"\['id'\] would"),
        ({"input_col": "content", "rows_per_request": 0}, "rows_per_request=0"),
        ({"input_col": "content", "requests_in_flight": True}, "requests_in_flight=True"),
        ({"input_col": "content", "model": 7}, "of type int"),
    ],
)
def test_wrong_options_are_refused_in_the_driver(spark, options, reason):
    df = spark.createDataFrame([], SCHEMA)
    with pytest.raises(ConfigurationError, match=reason):
        detect(df, options.pop("model", "yolov3-tiny"), **options)


def test_a_model_of_ones_own_must_be_allowed(spark, photos):
    images = spark.read.format("binaryFile").load(str(photos))
    found = detect(images, FakeSpec(), input_col="content", key_cols=[])
    with pytest.raises(Exception, match="allow_code=True"):
        found.count()
