"""What notebooks show of models, statistics, detections and summaries."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import daskshare
from daskshare.client import SharedModel
from daskshare.models.spec import Detections
from daskshare.notebook import ClusterStats
from daskshare.testing import FakeSpec
from tests.unit.test_cli import FAILED, summary
from tests.unit.test_html_repr import cells


def pairs(shown) -> dict[str, str]:
    return dict(cells(shown._repr_html_()))


def test_a_detector_shows_its_options():
    yolo = daskshare.yolov3("yolov3-tiny", classes=["car", "bus"], input_size=320)
    shown = pairs(yolo)
    assert shown["classes"] == "car, bus"
    assert shown["input size"] == "320x320"
    assert shown["confidence threshold"] == "0.25"
    assert shown["key"] == yolo.key[:24]
    assert shown["weights at most"] == "35.4 MB"
    assert "precision" not in shown
    assert pairs(daskshare.yolov3("yolov3-tiny"))["classes"] == "all 80"


def test_any_model_shows_its_options():
    model = daskshare.share(lambda device: None, name="<b>resnet</b>", input_dtype="float16")
    assert "<b>" not in model._repr_html_()
    assert pairs(model)["input dtype"] == "float16"
    assert pairs(SharedModel(FakeSpec(factor=3.0)))["factor"] == "3.00"


REPORT = {
    "state": "ready",
    "device": {"name": "NVIDIA H200"},
    "models": {
        "k": {
            "name": "yolov3",
            "state": "ready",
            "loads": 1,
            "frames": 6400,
            "batches": 200,
            "mean_batch_size": 32.0,
            "model_bytes": 124_000_000,
        }
    },
}


def test_statistics_are_a_dict_that_shows_a_line_a_model():
    stats = ClusterStats({"tcp://a:1": REPORT, "tcp://b:2": {"state": "absent", "models": {}}})
    assert isinstance(stats, dict)
    assert json.loads(json.dumps(stats)) == stats
    assert pickle.loads(pickle.dumps(stats)) == stats  # noqa: S301
    head, first, second = cells(stats._repr_html_())
    assert dict(zip(head, first, strict=True)) == {
        "worker": "tcp://a:1",
        "device": "NVIDIA H200",
        "model": "yolov3",
        "state": "ready",
        "loads": "1",
        "frames": "6,400",
        "batches": "200",
        "mean batch": "32.00",
        "weights": "124.0 MB",
    }
    assert second[:4] == ["tcp://b:2", "", "no model yet", "absent"]


def test_a_failed_worker_says_why():
    stats = ClusterStats({"tcp://a:1": {"state": "failed", "reason": "no <CUDA>", "models": {}}})
    assert cells(stats._repr_html_())[1][3] == "failed: no <CUDA>"


@pytest.mark.parametrize("count", [0, 1, 100])
def test_detections(count):
    found = Detections(
        xyxy=np.full((count, 4), 1.25, np.float32),
        confidence=np.full(count, 0.5, np.float32),
        class_id=np.zeros(count, np.int16),
        class_names=("<car>",),
    )
    text = found._repr_html_()
    rows = cells(text)
    assert rows[0] == ["class", "confidence", "x_min", "y_min", "x_max", "y_max"]
    assert len(rows) == 1 + min(count, 30)
    if count:
        assert rows[1] == ["<car>", "0.50", "1.20", "1.20", "1.20", "1.20"]
    title = next(ET.fromstring(text).iter("div")).find("div").text
    assert title == {0: "0 objects", 1: "1 object", 100: "100 objects"}[count]


def test_a_summary():
    shown = pairs(summary(failed=(FAILED,)))
    assert shown["found"] == "car 2, bus 1"
    assert shown["this run"] == "20 frames"
    assert "a.mp4 is no video" in shown["failed"]
    assert "truncated" not in shown
    assert "this run" not in pairs(summary(new_chunks=0, new_frames=0))


def test_showing_needs_nothing_heavy():
    code = (
        "import sys, daskshare\n"
        "daskshare.yolov3('yolov3-tiny')._repr_html_()\n"
        "assert 'torch' not in sys.modules and 'IPython' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
