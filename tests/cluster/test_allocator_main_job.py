"""The main job on four devices with two models at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed import Client

import daskshare
from daskshare.demo import demo_clip
from daskshare.results.parquet import read_detections
from tests.cluster.conftest import start
from tests.cluster.stand_ins import books, decisions, no_hook_fails, start_stand_ins


@pytest.mark.slow
def test_two_models_at_once_on_four_workers(tmp_path, importable_by_subprocesses):
    clips = [tmp_path / f"{name}.mp4" for name in "abcd"]
    for clip in clips:
        os.symlink(demo_clip(), clip)
    models = {
        "large": daskshare.yolov3("yolov3-tiny", input_size=160),
        "small": daskshare.yolov3("yolov3-tiny", input_size=96, classes=["person"]),
    }
    with (
        start(n_workers=4, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
        ThreadPoolExecutor(2) as pool,
        no_hook_fails(),
    ):
        start_stand_ins(client, {})

        def run(name):
            return daskshare.detect(
                clips,
                models[name],
                tmp_path / name,
                client=client,
                chunk_seconds=1,
                progress=False,
            )

        summaries = dict(zip(models, pool.map(run, models), strict=True))
        for name, summary in summaries.items():
            assert summary.failed == ()
            assert summary.frames == 4 * 250
            table = read_detections(tmp_path / name)
            assert table.num_rows == summary.num_detections > 0
            # The four clips are one, so the rows of each must be the same.
            counts = [table["video"].to_pylist().count(str(clip)) for clip in clips]
            assert len(set(counts)) == 1
        left = books(client)
        assert len(left["devices"]) == 4
        for model in models.values():
            sent = decisions(client, model)
            assert len(sent) >= 4 * 10
            # At most one copy on each device, on which its tasks ran.
            assert len(decisions(client, model, "load")) <= 4
        used = {d["worker"] for model in models.values() for d in decisions(client, model)}
        assert len(used) == 4
        assert left["in_pool"] == 0
