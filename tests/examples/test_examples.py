"""Each example as a user runs it, on a short clip."""

from __future__ import annotations

import re

import pytest

from tests.examples.conftest import FIRST, LAST, ROOT, without_last_heartbeats

pytestmark = pytest.mark.timeout(400)

FRAMES = LAST - FIRST


def test_all_examples_are_run():
    source = (ROOT / "tests" / "examples" / "test_examples.py").read_text("utf-8")
    run = re.findall(r'run_example\("(\d\d)"', source)
    there = [path.name[:2] for path in sorted((ROOT / "examples").glob("[0-9]*.py"))]
    assert sorted({*run}) == [n for n in there if n not in SPARK]
    assert len(set(there)) == len(there), "two examples of one number"


def test_of_a_log_only_a_heartbeat_that_came_too_late_is_left_out():
    record = """2026-01-02 03:04:05,678 - distributed.worker - ERROR - \
Failed to communicate with scheduler during heartbeat.
Traceback (most recent call last):
  File "comm/tcp.py", line 226, in read
tornado.iostream.StreamClosedError: Stream is closed

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "worker.py", line 1165, in heartbeat
distributed.comm.core.CommClosedError: in <TCP (closed) ConnectionPool.heartbeat_worker>: closed
"""
    other = record.replace("during heartbeat.", "during lunch.")
    assert without_last_heartbeats(f"before\n{record}{record}") == "before\n"
    assert without_last_heartbeats(f"{record}{other}") == other
    crash = f"{record}Traceback (most recent call last):\nValueError: no\n"
    assert without_last_heartbeats(crash) == crash


#: Run by tests/spark, where there is a Java.
SPARK = {
    path.name[:2]
    for path in (ROOT / "examples").glob("[0-9]*.py")
    if "pyspark" in path.read_text("utf-8")
}


def test_01_traffic_videos(run_example, short_clip, tmp_path):
    text = run_example("01", short_clip)
    assert f"{FRAMES} frames of 1 video" in text
    assert re.search(r"\d cars in frame \d+ of .*short\.mp4", text)
    assert list((tmp_path / "demo-output/traffic/detections").glob("*.parquet"))
    again = run_example("01", short_clip)
    assert "this run did" not in again


def test_02_any_torch_model(run_example):
    text = run_example("02")
    right = re.search(r"right: ([\d.]+)%", text)
    assert float(right.group(1)) > 95
    assert "80 tasks shared 1 copy" in text


def test_03_arrays_and_dataframes(run_example, short_clip):
    text = run_example("03", short_clip)
    assert f"blocks, {FRAMES} frames" in text
    assert "person in" in text or "car in" in text
    assert "with 1 copy of the model" in text


def test_04_two_models(run_example, short_clip):
    text = run_example("04", short_clip)
    detections = [int(n) for n in re.findall(r"in (\d+) detections of cars", text)]
    assert sum(detections) > 0
    # The second model saw each car that the first one found.
    assert f"colours: 1 load, {sum(detections)} items" in text
    assert f"yolov3-tiny: 1 load, {FRAMES} items" in text


def test_05_count_vehicles(run_example, short_clip):
    text = run_example("05", short_clip)
    assert re.search(r"short\.mp4: \d+ vehicles followed; \d+ crossed the line upwards", text)


def test_06_existing_cluster(run_example):
    text = run_example("06")
    assert "before: ['absent']" in text
    assert text.count("results right") == 2
    assert text.count("ready, 1 copy") == 3
