"""detect() on a dask-cuda cluster: NVDEC in, the reference's objects out, one copy of the model."""

from __future__ import annotations

import dask
import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed import Client

import daskshare
from daskshare.models.spec import Detections
from daskshare.results.parquet import read_detections
from tests.clip import traffic_clip
from tests.reference import disagreements, expected_detections

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def client():
    with (
        daskshare.local_cluster(
            device="cuda", threads_per_worker=8, CUDA_VISIBLE_DEVICES="0", dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def on_reference_frames(table):
    """Turn the table's rows of the reference's frames back into one Detections a frame."""
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "class_name"}
    results = []
    for number in expected_detections():
        rows = columns["frame"] == number
        boxes = [columns[name][rows] for name in ("x_min", "y_min", "x_max", "y_max")]
        results.append(
            Detections(
                np.stack(boxes, axis=1), columns["confidence"][rows], columns["class_id"][rows], ()
            )
        )
    return results


@pytest.mark.parametrize("decoder", ["nvdec", "pyav"])
@pytest.mark.parametrize(
    ("precision", "min_iou", "max_confidence_error"),
    [("fp32", 0.95, 0.02), ("fp16", 0.90, 0.05), ("bf16", 0.90, 0.05)],
)
def test_the_clip_on_the_gpu_agrees_with_the_reference(
    client, tmp_path, decoder, precision, min_iou, max_confidence_error
):
    with dask.config.set({"daskshare.video.decoder": decoder}):
        summary = daskshare.detect(
            traffic_clip(),
            daskshare.yolov3("yolov3-tiny", precision=precision),
            tmp_path / "out",
            client=client,
            chunk_seconds=2,
            progress=False,
        )
    assert summary.failed == ()
    assert summary.decoders == {decoder: 250}
    assert sum(pq.read_table(summary.chunks_path)["num_frames"].to_pylist()) == 250
    found = on_reference_frames(read_detections(summary.output))
    assert disagreements(found, min_iou=min_iou, max_confidence_error=max_confidence_error) == []


def test_tasks_on_the_gpu_share_one_load(client, tmp_path):
    model = daskshare.yolov3("yolov3-tiny", confidence_threshold=0.31)
    clips = []
    for i in range(8):
        clips.append(tmp_path / f"cam{i}.mp4")
        clips[i].symlink_to(traffic_clip())
    summary = daskshare.detect(
        clips, model, tmp_path / "out", client=client, chunk_seconds=2, progress=False
    )
    assert (summary.frames, summary.model_loads, summary.model_copies) == (2000, 1, 1)
    assert summary.concurrent_tasks > 1
    assert summary.memory_saved_bytes == (summary.concurrent_tasks - 1) * summary.model_bytes
    tables = [read_detections(summary.output, video=str(clip)) for clip in clips]
    assert all(table.num_rows > 0 for table in tables)


def test_a_second_run_on_the_gpu_keeps_what_is_there(client, tmp_path):
    model = daskshare.yolov3("yolov3-tiny")

    def run():
        return daskshare.detect(
            traffic_clip(), model, tmp_path, client=client, chunk_seconds=2, progress=False
        )

    first = run()
    (lost, *kept) = sorted(first.detections_path.iterdir())
    before = [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    second = run()
    assert second.new_chunks == 1
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert second.frames == first.frames
