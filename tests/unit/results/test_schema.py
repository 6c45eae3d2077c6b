import numpy as np
import pyarrow as pa
import pytest

from daskshare.errors import ConfigurationError
from daskshare.models.spec import DETECTION_COLUMNS, Detections
from daskshare.results.schema import CHUNKS_SCHEMA, DETECTIONS_SCHEMA, detections_batch

NAMES = ("person", "car", "bus")


def found(*rows):
    """Detections of one frame from (class_id, confidence, x_min, y_min, x_max, y_max)."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return Detections(values[:, 2:], values[:, 1], values[:, 0].astype(np.int16), NAMES)


def test_columns_and_types_are_the_published_ones():
    assert tuple(DETECTIONS_SCHEMA.names) == DETECTION_COLUMNS
    types = {field.name: field.type for field in DETECTIONS_SCHEMA}
    assert types == {
        "video": pa.string(),
        "frame": pa.int64(),
        "pts_seconds": pa.float64(),
        "class_id": pa.int16(),
        "class_name": pa.dictionary(pa.int32(), pa.string()),
        "confidence": pa.float32(),
        **dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), pa.float32()),
    }
    first = ["video", "first_frame", "num_frames", "num_detections", "status", "error"]
    assert CHUNKS_SCHEMA.names[:6] == first


def test_rows_carry_their_frame_time_class_and_box():
    batch = detections_batch(
        "a.mp4",
        100,
        np.array([4.0, 4.04, 4.08]),
        [found((1, 0.9, 1, 2, 3, 4), (0, 0.5, 5, 6, 7, 8)), found(), found((2, 0.7, 9, 8, 11, 10))],
    )
    assert batch.schema.equals(DETECTIONS_SCHEMA)
    assert batch.to_pylist() == [
        {
            "video": "a.mp4",
            "frame": frame,
            "pts_seconds": pts,
            "class_id": class_id,
            "class_name": name,
            "confidence": pytest.approx(confidence),
            "x_min": box[0],
            "y_min": box[1],
            "x_max": box[2],
            "y_max": box[3],
        }
        for frame, pts, class_id, name, confidence, box in [
            (100, 4.0, 1, "car", 0.9, (1, 2, 3, 4)),
            (100, 4.0, 0, "person", 0.5, (5, 6, 7, 8)),
            (102, 4.08, 2, "bus", 0.7, (9, 8, 11, 10)),
        ]
    ]


def test_frames_without_detections_give_no_rows_of_the_same_schema():
    batch = detections_batch("a.mp4", 0, np.array([0.0, 0.1]), [found(), found()])
    assert batch.num_rows == 0
    assert batch.schema.equals(DETECTIONS_SCHEMA)


@pytest.mark.parametrize("results", [[np.zeros(3)], [], [found(), found()]])
def test_a_model_that_is_no_detector_is_refused(results):
    with pytest.raises(ConfigurationError, match="one Detections a frame"):
        detections_batch("a.mp4", 0, np.array([0.0]), results)
