"""The main job on four devices with two models at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed import Client

import daskshare
from daskshare.client import SharedModel
from daskshare.results.parquet import read_detections
from tests.cluster.conftest import start
from tests.cluster.stand_ins import books, decisions, no_hook_fails, start_stand_ins
from tests.cluster.test_detect import BrightnessSpec, expected_rows, make_video


@pytest.mark.slow
def test_two_models_at_once_on_four_workers(tmp_path, importable_by_subprocesses):
    folder = tmp_path / "cams"
    folder.mkdir()
    starts = {make_video(folder / f"{i}.mp4", start=10 * i): 10 * i for i in range(8)}
    models = {name: SharedModel(BrightnessSpec(name=name, key=f"key of {name}")) for name in "ab"}
    with (
        start(n_workers=4, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
        ThreadPoolExecutor(2) as pool,
        no_hook_fails(),
    ):
        start_stand_ins(client, {})
        for model in models.values():
            daskshare.load(client, model, replicas=4)

        def run(name):
            return daskshare.detect(
                sorted(starts),
                models[name],
                tmp_path / name,
                client=client,
                chunk_seconds=0.4,
                progress=False,
            )

        summaries = dict(zip(models, pool.map(run, models), strict=True))
        want = [row[:2] for path in sorted(starts) for row in expected_rows(path, 60, starts[path])]
        for name, summary in summaries.items():
            assert summary.failed == ()
            assert summary.chunks == 8 * 6
            table = read_detections(tmp_path / name)
            assert list(zip(*(table[c].to_pylist() for c in ("video", "frame")), strict=True)) == (
                want
            )
            sent = decisions(client, models[name])
            assert len(sent) == 8 * 6
            assert len({d["worker"] for d in sent}) > 1
            # One copy on each device at most, however many tasks ran there.
            assert len(decisions(client, models[name], "load")) == 4
        left = books(client)
        assert len(left["devices"]) == 4
        assert left["in_pool"] == 0
