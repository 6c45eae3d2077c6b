from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from daskshare.dashboard.metrics import SCHEDULER_METRICS, WORKER_METRICS, ProcessMetrics
from daskshare.dashboard.snapshot import take_snapshot
from tests.unit.dashboard.reports import model, report

DOCS = Path(__file__).parents[3] / "docs"


def served(metrics, value):
    """What a scrape gives, through the official writer and parser."""
    registry = CollectorRegistry()
    mine = ProcessMetrics(metrics._describe)
    mine._sources[0] = lambda: value
    registry.register(mine)
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


def samples(families):
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k != "key")): s.value
        for family in families
        for s in family.samples
    }


BUSY = report(
    "a",
    model(
        frames=70,
        batches=4,
        batch_size_counts={"1": 1, "5": 1, "32": 2},
        busy_seconds=1.5,
        leases=2,
        peak_leases=3,
        engine={"queue_frames": 6, "queue_age_seconds": 0.25, "mode": "compiled", "ceiling": 32},
    ),
    model("n", state="unloaded", load_error="gone", model_bytes=0),
)


def test_a_workers_metrics():
    got = samples(served(WORKER_METRICS, BUSY))
    assert got["daskshare_device_time_seconds_total", "busy"] == 1.0
    assert got["daskshare_model_frames_total", "m"] == 70
    assert got["daskshare_model_busy_seconds_total", "m"] == 1.5
    assert got["daskshare_model_queue_age_seconds", "m"] == 0.25
    assert got["daskshare_model_compiled", "m"] == 1
    assert got["daskshare_model_users", "m"] == 2
    assert got["daskshare_model_state", "m", "ready"] == 1
    assert got["daskshare_model_state", "n", "failed"] == 1
    assert got["daskshare_model_state", "n", "unloaded"] == 0
    assert got["daskshare_model_batch_frames_sum", "m"] == 70
    assert got["daskshare_model_batch_frames_count", "m"] == 4
    buckets = {
        float(key[1]): value
        for key, value in got.items()
        if key[0].endswith("bucket")
        if key[2] == "m"
    }
    assert [buckets[b] for b in (1, 2, 4, 8, 16, 32, 64, float("inf"))] == [1, 1, 1, 2, 2, 4, 4, 4]
    assert got["daskshare_video_chunks_total", "complete"] == 6
    assert got["daskshare_video_chunks_total", "aborted"] == 3
    assert got["daskshare_video_decoded_chunks_total", "nvdec"] == 4


def test_a_worker_that_has_nothing_to_say_yet():
    assert samples(served(WORKER_METRICS, {})) == {}


def test_a_schedulers_metrics():
    snapshot = take_snapshot(0.0, [("a", "tcp://a", BUSY), ("b", "tcp://b", {})], {"key-of-m": 9})
    got = samples(served(SCHEDULER_METRICS, snapshot))
    assert got["daskshare_scheduler_devices", "ready"] == 1
    assert got["daskshare_scheduler_devices", "starting"] == 1
    assert got["daskshare_scheduler_model_copies", "m", "ready"] == 1
    assert got["daskshare_scheduler_model_copies", "n", "failed"] == 1
    assert got["daskshare_scheduler_model_saved_bytes", "m"] == 200
    assert got["daskshare_scheduler_model_held_tasks", "m"] == 9


@pytest.mark.parametrize("metrics", [WORKER_METRICS, SCHEDULER_METRICS])
def test_names_follow_the_conventions(metrics):
    value = BUSY if metrics is WORKER_METRICS else take_snapshot(0.0, [("a", "t", BUSY)], {})
    families = served(metrics, value)
    assert len(families) > 5
    for family in families:
        assert re.fullmatch(r"daskshare_[a-z_]*[a-z]", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert "milli" not in family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            if "time" in sample.name or "age" in sample.name:
                assert "_seconds" in sample.name
            if "memory" in sample.name or "saved" in sample.name:
                assert "_bytes" in sample.name


def test_the_newest_of_several_servers_answers_and_the_last_one_leaves_nothing():
    metrics = ProcessMetrics(lambda value: iter(()))
    asked = []
    one, two = object(), object()
    metrics.add(one, lambda: asked.append("one"))
    metrics.add(two, lambda: asked.append("two"))
    list(metrics.collect())
    metrics.remove(two)
    list(metrics.collect())
    assert asked == ["two", "one"]
    metrics.remove(two)
    metrics.remove(one)
    list(metrics.collect())
    assert asked == ["two", "one"]
    assert metrics not in REGISTRY._collector_to_names


def all_families():
    snapshot = take_snapshot(0.0, [("a", "tcp://a", BUSY)], {})
    return [*served(WORKER_METRICS, BUSY), *served(SCHEDULER_METRICS, snapshot)]


def test_the_page_on_metrics_lists_each_with_its_type_and_no_other():
    text = (DOCS / "metrics.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(daskshare_\w+)` \| (\w+) \|", text, re.MULTILINE))
    types = {}
    for family in all_families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        # The text format has no type for these; their names say it.
        types[name] = "info" if name.endswith("_info") else family.type
    assert listed == types


@pytest.mark.parametrize("name", ["grafana.json", "metrics.md"])
def test_queries_ask_for_what_is_served(name):
    text = (DOCS / name).read_text("utf-8")
    served_names = {sample.name for family in all_families() for sample in family.samples}
    bases = {family.name for family in all_families()}
    asked = set(re.findall(r"daskshare_[a-z_]+[a-z]", text))
    assert asked
    assert asked <= served_names | bases


def test_the_dashboard_for_grafana_is_whole():
    board = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) > 10
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"]["uid"] == "${datasource}"
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "model"]
