from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from daskshare.errors import ConfigurationError
from daskshare.models.spec import Detections
from daskshare.results.collect import FrameCollector


def found(*class_ids):
    n = len(class_ids)
    return Detections(
        np.arange(4 * n, dtype=np.float32).reshape(n, 4),
        np.linspace(0.9, 0.5, n, dtype=np.float32),
        np.array(class_ids, np.int16),
        ("person", "car"),
    )


@pytest.fixture
def written():
    return []


def test_consecutive_frames_become_one_batch(written):
    rows = FrameCollector("a.mp4", written.append)
    rows.add(10, np.array([1.0, 1.1]), [found(1, 0), found()])
    rows.add(12, np.array([1.2]), [found(1)])
    assert written == []
    rows.flush()
    rows.flush()
    (batch,) = written
    assert batch.column("frame").to_pylist() == [10, 10, 12]
    assert batch.column("pts_seconds").to_pylist() == [1.0, 1.0, 1.2]
    assert batch.column("class_name").to_pylist() == ["car", "person", "car"]
    assert set(batch.column("video").to_pylist()) == {"a.mp4"}


def test_a_gap_between_frames_ends_a_batch(written):
    rows = FrameCollector("a.mp4", written.append)
    rows.add(0, np.array([0.0]), [found(0)])
    rows.add(7, np.array([0.7]), [found(1)])
    rows.flush()
    assert [batch.column("frame").to_pylist() for batch in written] == [[0], [7]]


def test_no_more_frames_wait_than_told(written):
    rows = FrameCollector("a.mp4", written.append, max_frames=2)
    for frame in range(5):
        rows.add(frame, np.array([frame / 10]), [found(0)])
    assert [batch.num_rows for batch in written] == [2, 2]
    rows.flush()
    table = pa.Table.from_batches(written)
    assert table.column("frame").to_pylist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("results", [[found(0)], [found(0), None], ["a", "b"]])
def test_what_is_no_detections_fails_at_once(written, results):
    rows = FrameCollector("a.mp4", written.append)
    with pytest.raises(ConfigurationError, match="one Detections a frame"):
        rows.add(0, np.array([0.0, 0.1]), results)
